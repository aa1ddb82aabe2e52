// SPDX-License-Identifier: Apache-2.0
// sola::wkv and sola::wkv_backward for the dispatch key CPU: checks, memory, the choice of an instruction set.
// Nothing happens before sola_load is called: Python calls it after it has defined the operators, a C++ program that
// runs an exported graph without Python calls sola_load(1), which defines them too.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "torch_shim.h"
#include "wkv.h"

namespace sola {
namespace {

using torch::check;
using torch::Handle;
using torch::shim;
using torch::Value;

const char* const schemas[] = {
    "wkv(Tensor decay, Tensor bonus, Tensor key, Tensor value) -> Tensor",
    "wkv_backward(Tensor decay, Tensor bonus, Tensor key, Tensor value, Tensor grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)"};

const Kernel* kernel = nullptr;
std::array<int32_t, 4> dtypes;  // torch's numbers, in the order of Type

// what this machine can run, best last
std::vector<const Kernel*> available() {
  std::vector<const Kernel*> all{&generic::kernel};
#if defined(SOLA_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    all.push_back(&avx2::kernel);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      all.push_back(&avx512::kernel);
    }
  }
#endif
  return all;
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
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
    Handle made = nullptr;
    check(shim.aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                        dtypes[static_cast<size_t>(type)], shim.aoti_torch_device_type_cpu(), 0, &made),
          "allocate a tensor");
    return Tensor(made);
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
    throw std::invalid_argument(std::string("sola::wkv: ") + name +
                                " must be float64, float32, bfloat16 or float16; convert it");
  }
  // a new contiguous tensor of this type
  Tensor copy(Type type) const {
    Tensor made = empty(sizes(), type);
    check(shim.aoti_torch_copy_(made.handle_, handle_, 0), "copy a tensor");
    return made;
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

std::string text(const std::vector<int64_t>& sizes) {
  std::string all = "[";
  for (size_t i = 0; i < sizes.size(); ++i) all += (i ? ", " : "") + std::to_string(sizes[i]);
  return all + "]";
}

void expect(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, const char* like) {
  if (!tensor.on_cpu()) throw std::invalid_argument(std::string("sola::wkv: ") + name + " is not on the CPU like key");
  const std::vector<int64_t> found = tensor.sizes();
  if (found == sizes) return;
  throw std::invalid_argument(std::string("sola::wkv: ") + name + " is " + text(found) + ", expected " + like + " = " +
                              text(sizes));
}

// [channels] as float64
std::vector<double> parameter(const Tensor& tensor, const char* name, int64_t channels) {
  const Type type = tensor.type(name);
  const int64_t stride = tensor.strides()[0];
  std::vector<double> out(static_cast<size_t>(channels));
  if (type == Type::float32) {
    const float* data = static_cast<const float*>(tensor.read());
    for (int64_t i = 0; i < channels; ++i) out[static_cast<size_t>(i)] = data[i * stride];
  } else {
    const Tensor wide = tensor.copy(Type::float64);
    std::copy_n(static_cast<const double*>(wide.read()), channels, out.begin());
  }
  return out;
}

// sum over the images, in their order, in the parameter's own type
Tensor total(const std::vector<double>& partial, int64_t batch, int64_t channels, Type type) {
  const Type wide = type == Type::float32 ? Type::float32 : Type::float64;
  Tensor out = Tensor::empty({channels}, wide);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int64_t b = 0; b < batch; ++b) sum += partial[static_cast<size_t>(b * channels + c)];
    if (wide == Type::float32) {
      static_cast<float*>(out.write())[c] = static_cast<float>(sum);
    } else {
      static_cast<double*>(out.write())[c] = sum;
    }
  }
  return type == wide ? std::move(out) : out.copy(type);
}

void parallel_for(int64_t count, int64_t grain, Body body, void* context) {
  check(shim.torch_parallel_for(0, count, grain, body, context), "run in parallel");
}

// one call: its tensors checked, readable by the kernel, and the problem they make
struct Call {
  Tensor decay, bonus, key, value;
  Type key_type, value_type, type;
  std::vector<int64_t> sizes;
  std::vector<double> w, u;
  Problem problem;

  explicit Call(const Value* stack) : decay(stack[0]), bonus(stack[1]), key(stack[2]), value(stack[3]) {}

  void prepare() {
    sizes = key.sizes();
    if (sizes.size() != 3) {
      throw std::invalid_argument("sola::wkv: key is " + text(sizes) + ", expected [batch, tokens, channels]");
    }
    expect(decay, "decay", {sizes[2]}, "[channels]");
    expect(bonus, "bonus", {sizes[2]}, "[channels]");
    expect(value, "value", sizes, "key's size");
    key_type = key.type("key");
    value_type = value.type("value");
    type = key_type == value_type                                             ? key_type
           : key_type == Type::float64 || value_type == Type::float64 ? Type::float64
                                                                              : Type::float32;
    w = parameter(decay, "decay", sizes[2]);
    u = parameter(bonus, "bonus", sizes[2]);
    uint32_t threads = 1;
    check(shim.torch_get_num_threads(&threads), "count its threads");
    problem.batch = sizes[0], problem.tokens = sizes[1], problem.channels = sizes[2], problem.threads = threads;
    problem.decay = w.data(), problem.bonus = u.data();
    problem.key = input(key, key_type);
    problem.value = input(value, value_type);
  }

  bool nothing() const { return problem.batch * problem.tokens * problem.channels == 0; }

  // the kernel reads any strides, but channels must be adjacent and of the common type
  Array input(Tensor& tensor, Type own) const {
    if (own != type || (tensor.strides()[2] != 1 && sizes[2] > 1)) tensor = tensor.copy(type);
    return tensor.array(const_cast<void*>(tensor.read()));
  }

  Tensor result(Array& array) const {
    Tensor made = Tensor::empty(sizes, type);
    array = made.array(made.write());
    return made;
  }

  Tensor as(Tensor made, Type own) const { return own == type ? std::move(made) : made.copy(own); }
};

void wkv(Value* stack, uint64_t, uint64_t) {
  Call call(stack);
  call.prepare();
  Tensor output = call.result(call.problem.output);
  if (!call.nothing()) kernel->forward(call.problem, call.type, parallel_for);
  stack[0] = call.as(std::move(output), call.value_type).release();
}

void wkv_backward(Value* stack, uint64_t, uint64_t) {
  Call call(stack);
  Tensor grad(stack[4]);
  call.prepare();
  expect(grad, "grad", call.sizes, "value's size");
  Problem& p = call.problem;
  p.grad = call.input(grad, grad.type("grad"));
  Tensor grad_key = call.result(p.grad_key), grad_value = call.result(p.grad_value);
  std::vector<double> partial_decay(static_cast<size_t>(p.batch * p.channels)), partial_bonus = partial_decay;
  p.grad_decay = partial_decay.data(), p.grad_bonus = partial_bonus.data();
  if (!call.nothing()) kernel->backward(p, call.type, parallel_for);
  std::array<Tensor, 4> results{total(partial_decay, p.batch, p.channels, call.decay.type("decay")),
                                total(partial_bonus, p.batch, p.channels, call.bonus.type("bonus")),
                                call.as(std::move(grad_key), call.key_type),
                                call.as(std::move(grad_value), call.value_type)};
  for (size_t i = 0; i < results.size(); ++i) stack[i] = results[i].release();
}

void register_operators(bool define) {
  void* library = nullptr;  // never deleted: that would take the operators away
  if (define) {
    check(shim.aoti_torch_library_init_fragment("sola", __FILE__, __LINE__, &library), "open the library sola");
    for (const char* schema : schemas) check(shim.aoti_torch_library_def(library, schema), "define an operator");
  }
  check(shim.aoti_torch_library_init_impl("sola", "CPU", __FILE__, __LINE__, &library), "open the library sola");
  check(shim.torch_library_impl(library, "wkv", wkv, torch::abi_version), "register wkv");
  check(shim.torch_library_impl(library, "wkv_backward", wkv_backward, torch::abi_version), "register wkv_backward");
}

}  // namespace
}  // namespace sola

#define SOLA_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the kernels, the first time; define != 0 defines the operators too. Null, or why it did not work.
SOLA_EXPORT const char* sola_load(int define) {
  static std::string reason;
  if (sola::kernel != nullptr) return nullptr;
  try {
    reason = sola::torch::find_torch();
    if (!reason.empty()) return reason.c_str();
    const sola::torch::Shim& shim = sola::torch::shim;
    sola::dtypes = {shim.aoti_torch_dtype_float64(), shim.aoti_torch_dtype_float32(), shim.aoti_torch_dtype_bfloat16(),
                    shim.aoti_torch_dtype_float16()};
    sola::kernel = sola::available().back();
    sola::register_operators(define != 0);
    return nullptr;
  } catch (const std::exception& error) {
    sola::kernel = nullptr;
    reason = error.what();
    return reason.c_str();
  }
}

// The instruction set in use, after switching to the named one if name is not null; null if this machine lacks it.
SOLA_EXPORT const char* sola_instruction_set(const char* name) {
  if (name == nullptr) return sola::kernel != nullptr ? sola::kernel->name : nullptr;
  for (const sola::Kernel* candidate : sola::available()) {
    if (std::string(candidate->name) == name) return (sola::kernel = candidate)->name;
  }
  return nullptr;
}
