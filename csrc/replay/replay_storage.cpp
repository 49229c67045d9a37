#include "replay/replay_storage.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__SSE4_2__)
#include <nmmintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "common/check.hpp"
#include "common/memory.hpp"
#include "replay/replay.hpp"

namespace urlfast {
namespace {

constexpr size_t kBuffer = size_t(1) << 20;

}  // namespace

Pages::Pages(int64_t bytes) : bytes_(std::max<int64_t>(bytes, 1)) {
  data_ = static_cast<char*>(map_pages(bytes_, true));
  if (!data_) throw MemoryShortage("could not map " + gigabytes(double(bytes_)) + ": " + std::strerror(errno));
}

Pages::Pages(int file, int64_t offset, int64_t bytes) : bytes_(std::max<int64_t>(bytes, 1)) {
  void* p = mmap(nullptr, size_t(bytes_), PROT_READ | PROT_WRITE, MAP_SHARED, file, off_t(offset));
  if (p == MAP_FAILED)
    throw SystemError(errno, "could not map " + gigabytes(double(bytes_)) + " of the scratch file", "scratch file");
  data_ = static_cast<char*>(p);
}

Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Pages::~Pages() {
  if (data_) unmap_pages(data_, bytes_);
}

int scratch_file(const std::string& folder, int64_t bytes) {
  int file = -1;
#ifdef O_TMPFILE
  file = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
#endif
  if (file < 0) {  // a file system without nameless files: a name for a moment
    std::string name = folder + "/.urlfast-scratch-XXXXXX";
    file = mkostemp(name.data(), O_CLOEXEC);
    if (file < 0) throw SystemError(errno, "could not create a scratch file in path", folder);
    unlink(name.c_str());
  }
  // Reserved now: a write to a page for which the disk has no room would kill the process.
  const int code = posix_fallocate(file, 0, off_t(bytes));
  if (code != 0) {
    close(file);
    throw SystemError(code, "could not reserve " + gigabytes(double(bytes)) + " for the scratch file in path", folder);
  }
  return file;
}

uint32_t crc32c(uint32_t crc, const void* data, int64_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
#if defined(__SSE4_2__)
  uint64_t wide = crc;
  for (; bytes >= 8; bytes -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = uint32_t(wide);
  for (; bytes > 0; --bytes) crc = _mm_crc32_u8(crc, *p++);
#else
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? 0x82F63B78u ^ (c >> 1) : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  for (; bytes > 0; --bytes) crc = table[(crc ^ *p++) & 255] ^ (crc >> 8);
#endif
  return ~crc;
}

FileWriter::FileWriter(std::string path) : path_(std::move(path)) {
  file_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (file_ < 0) throw SystemError(errno, "could not create", path_);
  buffer_.reserve(kBuffer);
}

FileWriter::~FileWriter() {
  if (file_ < 0) return;
  close(file_);
  unlink(path_.c_str());
}

void FileWriter::fail(int code) {
  close(file_);
  file_ = -1;
  unlink(path_.c_str());
  throw SystemError(code, "could not write", path_);
}

void FileWriter::put(const char* data, int64_t bytes) {
  while (bytes > 0) {
    const ssize_t n = ::write(file_, data, size_t(std::min<int64_t>(bytes, int64_t(1) << 30)));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail(n < 0 ? errno : ENOSPC);
    data += n, bytes -= n;
  }
}

void FileWriter::flush() {
  put(buffer_.data(), int64_t(buffer_.size()));
  buffer_.clear();
}

void FileWriter::write(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  crc_ = crc32c(crc_, p, bytes);
  bytes_ += bytes;
  if (size_t(bytes) + buffer_.size() > kBuffer) flush();
  if (size_t(bytes) >= kBuffer / 4)
    flush(), put(p, bytes);
  else
    buffer_.insert(buffer_.end(), p, p + bytes);
}

void FileWriter::finish() {
  flush();
  if (fsync(file_) != 0) fail(errno);
  const int file = file_;
  file_ = -1;
  if (close(file) != 0) {  // where a network file system reports what it could not store
    const int code = errno;
    unlink(path_.c_str());
    throw SystemError(code, "could not write", path_);
  }
}

FileReader::FileReader(std::string path, int64_t bytes, uint32_t crc)
    : path_(std::move(path)), left_(bytes), expected_(crc) {
  file_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (file_ < 0 && errno == ENOENT) refuse("is missing");
  if (file_ < 0) throw SystemError(errno, "could not open", path_);
  struct stat info;
  const bool known = fstat(file_, &info) == 0;
  if (!known || info.st_size != bytes) {
    const int code = errno;
    close(file_);
    file_ = -1;
    if (!known) throw SystemError(code, "could not read", path_);
    refuse(text("is truncated or foreign: ", int64_t(info.st_size), " bytes where ", bytes, " were saved"));
  }
}

FileReader::~FileReader() {
  if (file_ >= 0) close(file_);
}

void FileReader::refuse(const std::string& why) const { throw std::invalid_argument(path_ + ": " + why); }

void FileReader::read(void* data, int64_t bytes) {
  char* to = static_cast<char*>(data);
  if (bytes < 0 || bytes > left_ + int64_t(buffer_.size() - position_)) refuse("is damaged: it ends too early");
  while (bytes > 0) {
    if (position_ == buffer_.size()) {
      buffer_.resize(size_t(std::min<int64_t>(left_, int64_t(kBuffer))));
      position_ = 0;
      for (size_t have = 0; have < buffer_.size();) {
        const ssize_t n = ::read(file_, buffer_.data() + have, buffer_.size() - have);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) throw SystemError(errno, "could not read", path_);
        if (n == 0) refuse("is damaged: it ends too early");
        have += size_t(n);
      }
      left_ -= int64_t(buffer_.size());
      crc_ = crc32c(crc_, buffer_.data(), int64_t(buffer_.size()));
    }
    const size_t n = std::min(size_t(bytes), buffer_.size() - position_);
    std::memcpy(to, buffer_.data() + position_, n);
    to += n, bytes -= int64_t(n), position_ += n;
  }
}

void FileReader::finish() {
  char rest[4096];
  while (const int64_t n = std::min<int64_t>(left_ + int64_t(buffer_.size() - position_), int64_t(sizeof rest)))
    read(rest, n);
  if (crc_ != expected_) refuse("is damaged: its checksum is not the one that was saved");
}

}  // namespace urlfast
