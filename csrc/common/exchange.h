// DLPack's table of C functions, as much as is read here of its version 1: how a library reads another one's tensors
// without its headers. A tensor's type has it as __dlpack_c_exchange_api__ (torch 2.10 and newer).
// Source: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <cstdint>

namespace dfq {

enum DeviceType : int32_t { kCpuDevice = 1, kCudaDevice = 2 };
enum TypeCode : uint8_t { kUnsignedCode = 1, kFloatCode = 2, kBFloatCode = 4 };

struct ExchangedTensor {
  char* data;
  int32_t device_type, device;
  int32_t dims;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // belong to the tensor
  uint64_t byte_offset;
};

struct ExchangeTable {
  uint32_t major, minor;
  ExchangeTable* older;
  void *allocate, *own, *give;  // not called here
  int (*look)(void* object, ExchangedTensor* found);  // not 0: a Python exception is set; null: not there
  int (*current_stream)(int32_t device_type, int32_t device, void** stream);
};

}  // namespace dfq
