// A borrowed n-dimensional array: pointer, dtype, shape, device. Owns nothing; no Python, torch or CUDA header reaches
// this file.
#pragma once
#include <cstdint>
#include <string>

namespace urlfast {

enum class DType : uint8_t { boolean, u8, u16, u32, u64, i8, i16, i32, i64, f16, bf16, f32, f64 };

inline int64_t item_size(DType dtype) {
  constexpr int64_t sizes[] = {1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8};
  return sizes[int(dtype)];
}
inline const char* dtype_name(DType dtype) {
  constexpr const char* names[] = {"bool",  "uint8", "uint16",  "uint32",   "uint64",  "int8",   "int16",
                                   "int32", "int64", "float16", "bfloat16", "float32", "float64"};
  return names[int(dtype)];
}

struct Device {
  bool cuda = false;
  int index = 0;
  bool operator==(const Device& other) const { return cuda == other.cuda && (!cuda || index == other.index); }
  bool operator!=(const Device& other) const { return !(*this == other); }
  std::string name() const { return cuda ? "cuda:" + std::to_string(index) : "cpu"; }
};

constexpr int kMaxRank = 8;

struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t strides[kMaxRank] = {};  // in items
  bool readonly = false;

  int64_t size(int axis) const { return shape[axis < 0 ? rank + axis : axis]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  bool contiguous() const {  // C order; axes of length 1 may have any stride
    int64_t expected = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
  std::string shape_text() const {
    std::string out = "(";
    for (int i = 0; i < rank; ++i) out += std::to_string(shape[i]) + (i + 1 < rank ? ", " : rank == 1 ? "," : "");
    return out + ")";
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace urlfast
