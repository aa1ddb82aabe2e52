// SPDX-License-Identifier: Apache-2.0
// An owning wrapper of a torch tensor on top of torch's stable C ABI, and the checks that the operators share.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include "torch_shim.h"
#include "wkv.h"

namespace sola {

using torch::check;
using torch::Handle;
using torch::shim;
using torch::Value;

inline std::array<int32_t, 4> dtypes;  // torch's dtype codes, in the order of Type

inline int64_t thread_count() {
  uint32_t threads = 1;
  check(shim.torch_get_num_threads(&threads), "return the number of threads");
  return threads;
}

class Tensor {
  Handle handle_ = nullptr;

 public:
  explicit Tensor(Handle handle) : handle_(handle) {}
  explicit Tensor(Value value) { memcpy(&handle_, &value, sizeof handle_); }
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) shim.aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor empty(const std::vector<int64_t>& sizes, Type type) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * std::max<int64_t>(sizes[i - 1], 1);
    Handle result = nullptr;
    check(shim.aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                        dtypes[static_cast<size_t>(type)], shim.aoti_torch_device_type_cpu(), 0,
                                        &result),
          "allocate a tensor");
    return Tensor(result);
  }

  std::vector<int64_t> sizes() const { return {sizes_pointer(), sizes_pointer() + dim()}; }
  int64_t dim() const {
    int64_t dim = 0;
    check(shim.aoti_torch_get_dim(handle_, &dim), "read a rank");
    return dim;
  }
  const int64_t* sizes_pointer() const {
    int64_t* sizes = nullptr;
    check(shim.aoti_torch_get_sizes(handle_, &sizes), "read sizes");
    return sizes;
  }
  const int64_t* strides() const {
    int64_t* strides = nullptr;
    check(shim.aoti_torch_get_strides(handle_, &strides), "read strides");
    return strides;
  }
  bool contiguous() const {
    int64_t next = 1;
    for (int64_t i = dim() - 1; i >= 0; --i) {
      const int64_t size = sizes_pointer()[i];
      if (size != 1 && strides()[i] != next) return false;
      next *= std::max<int64_t>(size, 1);  // the convention of torch for empty dimensions
    }
    return true;
  }
  bool on_cpu() const {
    int32_t device = 0;
    check(shim.aoti_torch_get_device_type(handle_, &device), "read a device");
    return device == shim.aoti_torch_device_type_cpu();
  }
  Type type(const char* name) const {
    int32_t dtype = 0;
    check(shim.aoti_torch_get_dtype(handle_, &dtype), "read a dtype");
    for (size_t i = 0; i < dtypes.size(); ++i) {
      if (dtypes[i] == dtype) return static_cast<Type>(i);
    }
    throw std::invalid_argument(std::string(name) +
                                " must be float64, float32, bfloat16 or float16; convert it");
  }
  // Return a contiguous copy with this dtype.
  Tensor copy(Type type) const {
    Tensor result = empty(sizes(), type);
    check(shim.aoti_torch_copy_(result.handle_, handle_, 0), "copy a tensor");
    return result;
  }
  const void* read() const {
    const void* data = nullptr;
    check(shim.torch_get_const_data_ptr(handle_, &data), "read a tensor");
    return data;
  }
  void* write() const {
    void* data = nullptr;
    check(shim.torch_get_mutable_data_ptr(handle_, &data), "write a tensor");
    return data;
  }
  Array array(void* data) const { return {data, strides()[0], strides()[1]}; }
  Value release() {
    Value value = 0;
    memcpy(&value, &handle_, sizeof handle_);
    handle_ = nullptr;
    return value;
  }
};

inline std::string format_sizes(const std::vector<int64_t>& sizes) {
  std::string all = "[";
  for (size_t i = 0; i < sizes.size(); ++i) all += (i ? ", " : "") + std::to_string(sizes[i]);
  return all + "]";
}

inline void check_size(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes,
                       const char* description) {
  if (!tensor.on_cpu()) throw std::invalid_argument(std::string(name) + " must be on the CPU");
  const std::vector<int64_t> actual = tensor.sizes();
  if (actual == sizes) return;
  throw std::invalid_argument(std::string(name) + " is " + format_sizes(actual) + ", expected " + description + " = " +
                              format_sizes(sizes));
}

// Return the values of a small tensor with any strides as float64. torch's own conversion costs more than most of the
// passes that read such tensors, so the usual cases are converted here.
inline std::vector<double> parameter(const Tensor& tensor, const char* name) {
  int64_t count = 1;
  for (int64_t size : tensor.sizes()) count *= size;
  std::vector<double> out(static_cast<size_t>(count));
  const Type type = tensor.type(name);
  if (type == Type::float32 && tensor.contiguous()) {
    std::copy_n(static_cast<const float*>(tensor.read()), count, out.begin());
  } else if (type == Type::bfloat16 && tensor.contiguous()) {
    const uint16_t* const from = static_cast<const uint16_t*>(tensor.read());
    std::transform(from, from + count, out.begin(), [](uint16_t upper_half) {
      const uint32_t bits = uint32_t{upper_half} << 16;
      float value = 0.0f;
      memcpy(&value, &bits, sizeof value);
      return value;
    });
  } else {
    const Tensor wide = tensor.copy(Type::float64);
    std::copy_n(static_cast<const double*>(wide.read()), count, out.begin());
  }
  return out;
}

// Rethrows the first exception of a thread unchanged; torch itself would only report that one occurred.
inline void parallel_for(int64_t count, int64_t grain, Body body, void* context) {
  struct Loop {
    Body body;
    void* context;
    std::exception_ptr error;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
  } loop{body, context, nullptr};
  const torch::ParallelBody piece = [](int64_t begin, int64_t end, void* of_loop) {
    Loop& loop = *static_cast<Loop*>(of_loop);
    try {
      loop.body(begin, end, loop.context);
    } catch (...) {
      if (!loop.failed.test_and_set()) loop.error = std::current_exception();
    }
  };
  check(shim.torch_parallel_for(0, count, grain, piece, &loop), "run in parallel");
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace sola
