// SPDX-License-Identifier: Apache-2.0
// The part of torch's stable C ABI that the operators use, declared here because the kernel is built without torch. One
// binary supports every torch from 2.11 on: the functions are looked up by name in the libtorch_cpu that is already
// loaded. Names and signatures: torch/csrc/stable/c/shim.h and torch/csrc/inductor/aoti_torch/c/shim.h.
#pragma once
#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sola::torch {

using Value = uint64_t;        // StableIValue; that of a tensor is its handle
using Handle = void*;          // AtenTensorHandle, owned
using Boxed = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
constexpr uint64_t abi_version = (uint64_t{2} << 56) | (uint64_t{11} << 48);  // of these declarations

#define SOLA_TORCH_FUNCTIONS(X)                                                                                       \
  X(int32_t, aoti_torch_device_type_cpu, ())                                                                          \
  X(int32_t, aoti_torch_dtype_float64, ())                                                                            \
  X(int32_t, aoti_torch_dtype_float32, ())                                                                            \
  X(int32_t, aoti_torch_dtype_bfloat16, ())                                                                           \
  X(int32_t, aoti_torch_dtype_float16, ())                                                                            \
  X(int32_t, aoti_torch_delete_tensor_object, (Handle))                                                               \
  X(int32_t, aoti_torch_get_dim, (Handle, int64_t*))                                                                  \
  X(int32_t, aoti_torch_get_sizes, (Handle, int64_t**))                                                               \
  X(int32_t, aoti_torch_get_strides, (Handle, int64_t**))                                                             \
  X(int32_t, aoti_torch_get_dtype, (Handle, int32_t*))                                                                \
  X(int32_t, aoti_torch_get_device_type, (Handle, int32_t*))                                                          \
  X(int32_t, aoti_torch_empty_strided,                                                                                \
    (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*))                                    \
  X(int32_t, aoti_torch_copy_, (Handle, Handle, int32_t))                                                             \
  X(int32_t, torch_get_const_data_ptr, (Handle, const void**))                                                        \
  X(int32_t, torch_get_mutable_data_ptr, (Handle, void**))                                                            \
  X(int32_t, torch_new_list_reserve_size, (size_t, void**))                                                           \
  X(int32_t, torch_list_size, (void*, size_t*))                                                                       \
  X(int32_t, torch_list_get_item, (void*, size_t, Value*))                                                            \
  X(int32_t, torch_list_push_back, (void*, Value))                                                                    \
  X(int32_t, torch_delete_list, (void*))                                                                              \
  X(int32_t, torch_get_num_threads, (uint32_t*))                                                                      \
  X(int32_t, torch_parallel_for, (int64_t, int64_t, int64_t, ParallelBody, void*))                                    \
  X(int32_t, aoti_torch_library_init_fragment, (const char*, const char*, uint32_t, void**))                          \
  X(int32_t, aoti_torch_library_init_impl, (const char*, const char*, const char*, uint32_t, void**))                 \
  X(int32_t, aoti_torch_library_def, (void*, const char*))                                                            \
  X(int32_t, torch_library_impl, (void*, const char*, Boxed, uint64_t))

struct Shim {
#define SOLA_POINTER(result, name, arguments) result(*name) arguments = nullptr;
  SOLA_TORCH_FUNCTIONS(SOLA_POINTER)
#undef SOLA_POINTER
};

inline Shim shim;

// Return an empty string, or a description of the missing symbol.
inline std::string bind_torch() {
#if defined(__APPLE__)
  void* library = RTLD_DEFAULT;
#else
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return "libtorch_cpu.so is not loaded";
#endif
#define SOLA_FIND(result, name, arguments)                               \
  shim.name = reinterpret_cast<result(*) arguments>(dlsym(library, #name)); \
  if (shim.name == nullptr) return "this version of torch does not export " #name;
  SOLA_TORCH_FUNCTIONS(SOLA_FIND)
#undef SOLA_FIND
  return "";
}

inline void check(int32_t error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("sola: torch failed to ") + what);
}

}  // namespace sola::torch
