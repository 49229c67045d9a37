// The DLPack ABI, both generations (before 1.0: DLManagedTensor; from 1.0: DLManagedTensorVersioned with a read-only
// flag). Declared here because the layout is the contract; see the DLPack specification, "C API".
#pragma once
#include <cstdint>

namespace urlfast::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in items; null means C-contiguous
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};
constexpr uint64_t kReadOnly = 1;
struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};

// From 1.3: C functions in place of __dlpack__ and __dlpack_device__, which cost microseconds. A type carries the table
// as the capsule __dlpack_c_exchange_api__ named "dlpack_exchange_api". They return 0, or -1 with a Python error set.
struct DLPackExchangeAPIHeader {
  DLPackVersion version;
  DLPackExchangeAPIHeader* previous;  // an older major version's table, or null
};
struct DLPackExchangeAPI {
  DLPackExchangeAPIHeader header;
  void* allocate;  // not used here
  int (*from_object)(void* object, DLManagedTensorVersioned** out);
  int (*to_object)(DLManagedTensorVersioned* tensor, void** out_object);
  int (*borrow_object)(void* object, DLTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

}  // namespace urlfast::dlpack
