// Memory and files of the replay: lazily touched pages, a scratch file that outlives nobody, checksummed reads and
// writes.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace urlfast {

// Zeroed pages that cost memory only when touched. Movable, freed at the end.
class Pages {
 public:
  Pages() = default;
  explicit Pages(int64_t bytes);                   // anonymous, huge pages advised; throws MemoryShortage
  Pages(int file, int64_t offset, int64_t bytes);  // of a file; `offset` a multiple of 4096 x 16
  Pages(Pages&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
  Pages& operator=(Pages&& other) noexcept;
  ~Pages();
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// A file of `bytes` bytes, all of them reserved, in `folder` but already unlinked: it goes when its last user does,
// however that one ends. Throws SystemError.
int scratch_file(const std::string& folder, int64_t bytes);

uint32_t crc32c(uint32_t crc, const void* data, int64_t bytes);

// Writes a file from its first byte to its last; throws SystemError and removes it when that fails.
class FileWriter {
 public:
  explicit FileWriter(std::string path);
  ~FileWriter();
  void write(const void* data, int64_t bytes);
  void finish();  // flushes, syncs, closes
  int64_t bytes() const { return bytes_; }
  uint32_t crc() const { return crc_; }

 private:
  void flush();
  void put(const char* data, int64_t bytes);
  [[noreturn]] void fail(int code);
  std::string path_;
  int file_ = -1;
  std::vector<char> buffer_;
  int64_t bytes_ = 0;
  uint32_t crc_ = 0;
};

// Reads a file whose size and checksum are known; throws std::invalid_argument naming it when they differ. The checksum
// is compared by finish(), so what was read is not to be believed before.
class FileReader {
 public:
  FileReader(std::string path, int64_t bytes, uint32_t crc);
  ~FileReader();
  void read(void* data, int64_t bytes);
  void finish();
  [[noreturn]] void refuse(const std::string& why) const;

 private:
  std::string path_;
  int file_ = -1;
  std::vector<char> buffer_;
  size_t position_ = 0;
  int64_t left_;
  uint32_t expected_, crc_ = 0;
};

}  // namespace urlfast
