// SPDX-License-Identifier: Apache-2.0
// The operators for dispatch key CPU: argument checks and memory of sola::wkv, and the choice of the instruction set.
// Nothing is registered before sola_load is called. Python calls it after defining the operators; a C++ program that
// runs an exported graph without Python calls sola_load(1), which also defines them.
#include <atomic>

#include "attention.h"
#include "register_attention.h"
#include "register_linear.h"
#include "register_passes.h"
#include "tensor.h"
#include "wkv.h"

#if defined(SOLA_X86)
#include <cpuid.h>
#endif
#if defined(SOLA_BFLOAT16) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sola {
namespace {

const char* const schemas[] = {
    "wkv(Tensor decay, Tensor bonus, Tensor key, Tensor value) -> Tensor",
    "wkv_with_states(Tensor decay, Tensor bonus, Tensor key, Tensor value) -> (Tensor, Tensor)",
    "wkv_backward(Tensor decay, Tensor bonus, Tensor key, Tensor value, Tensor states, Tensor grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)"};

std::atomic<const Kernel*> kernel{nullptr};

#if defined(SOLA_BFLOAT16)
Kernel with_matrix_unit(Kernel kernel) {
  kernel.name = "amx", kernel.linear = &amx::linear, kernel.attention = &amx::attention_kernels;
  return kernel;
}
const Kernel matrix_products = with_matrix_unit(avx512_bf16::kernel);

// True if the processor and the operating system support bfloat16 tiles (AMX).
constexpr long tile_data = 18;
bool has_matrix_unit() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  constexpr uint32_t bf16_and_tiles = 1u << 22 | 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16_and_tiles) != bf16_and_tiles) return false;
#if defined(__linux__)
  constexpr long get_supported_features = 0x1021;
  uint64_t supported = 0;
  return syscall(SYS_arch_prctl, get_supported_features, &supported) == 0 && (supported >> tile_data & 1) != 0;
#else
  return false;
#endif
}

// Requests permission to use AMX tile data, once, and returns true if it was granted. Alternate signal stacks must be
// larger afterwards, so permission is not requested before a product needs it.
bool request_matrix_unit() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023;
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

#if defined(SOLA_X86)
// __builtin_cpu_supports does not support "f16c" in GCC 10 and Clang 13
bool has_f16c() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0;
}
#endif

// the kernels that this CPU supports, the best one last
std::vector<const Kernel*> supported_kernels() {
  std::vector<const Kernel*> all{&generic::kernel};
#if defined(SOLA_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    all.push_back(&avx2::kernel);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      all.push_back(&avx512::kernel);
#if defined(SOLA_BFLOAT16)
      if (__builtin_cpu_supports("avx512bf16")) {
        all.push_back(&avx512_bf16::kernel);
        if (has_matrix_unit()) all.push_back(&matrix_products);
      }
#endif
    }
  }
#endif
  return all;
}

// the sum over images, in order, in the dtype of the parameter
Tensor sum_over_images(const std::vector<double>& partial, int64_t batch, int64_t channels, Type type) {
  const Type sum_type = type == Type::float32 ? Type::float32 : Type::float64;
  Tensor out = Tensor::empty({channels}, sum_type);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int64_t b = 0; b < batch; ++b) sum += partial[static_cast<size_t>(b * channels + c)];
    if (sum_type == Type::float32) {
      static_cast<float*>(out.write())[c] = static_cast<float>(sum);
    } else {
      static_cast<double*>(out.write())[c] = sum;
    }
  }
  return type == sum_type ? std::move(out) : out.copy(type);
}

// The arguments of a call: checked tensors, in a layout that the kernel supports, and the resulting problem.
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
      throw std::invalid_argument("sola::wkv: key is " + format_sizes(sizes) + ", expected [batch, tokens, channels]");
    }
    check_size(decay, "sola::wkv: decay", {sizes[2]}, "[channels]");
    check_size(bonus, "sola::wkv: bonus", {sizes[2]}, "[channels]");
    check_size(value, "sola::wkv: value", sizes, "the size of key");
    key_type = key.type("sola::wkv: key");
    value_type = value.type("sola::wkv: value");
    type = key_type == value_type                                             ? key_type
           : key_type == Type::float64 || value_type == Type::float64 ? Type::float64
                                                                              : Type::float32;
    w = parameter(decay, "sola::wkv: decay");
    u = parameter(bonus, "sola::wkv: bonus");
    problem.batch = sizes[0], problem.tokens = sizes[1], problem.channels = sizes[2];
    problem.threads = thread_count();
    problem.decay = w.data(), problem.bonus = u.data();
    problem.key = input(key, key_type);
    problem.value = input(value, value_type);
  }

  bool is_empty() const { return problem.batch * problem.tokens * problem.channels == 0; }

  // the kernel supports any batch and token strides, but channels must be adjacent and in the common dtype
  Array input(Tensor& tensor, Type dtype) const {
    if (dtype != type || (tensor.strides()[2] != 1 && sizes[2] > 1)) tensor = tensor.copy(type);
    return tensor.array(const_cast<void*>(tensor.read()));
  }

  Tensor result(Array& array) const {
    Tensor result = Tensor::empty(sizes, type);
    array = result.array(result.write());
    return result;
  }

  // the float64 kernel stores no states
  std::vector<int64_t> states_sizes() const {
    if (type == Type::float64) return {0};
    return {sizes[0], (sizes[1] + chunk_tokens - 1) / chunk_tokens, 4, sizes[2]};
  }

  Tensor cast(Tensor result, Type dtype) const { return dtype == type ? std::move(result) : result.copy(dtype); }
};

Tensor forward(Call& call) {
  Tensor output = call.result(call.problem.output);
  if (!call.is_empty()) kernel.load()->forward(call.problem, call.type, parallel_for);
  return call.cast(std::move(output), call.value_type);
}

void wkv(Value* stack, uint64_t, uint64_t) {
  Call call(stack);
  call.prepare();
  stack[0] = forward(call).release();
}

void wkv_with_states(Value* stack, uint64_t, uint64_t) {
  Call call(stack);
  call.prepare();
  Tensor states = Tensor::empty(call.states_sizes(), Type::float32);
  call.problem.states = static_cast<float*>(states.write());
  Tensor output = forward(call);
  stack[0] = output.release(), stack[1] = states.release();
}

void wkv_backward(Value* stack, uint64_t, uint64_t) {
  Call call(stack);
  Tensor states(stack[4]), grad(stack[5]);
  call.prepare();
  check_size(grad, "sola::wkv: grad", call.sizes, "the size of value");
  check_size(states, "sola::wkv: states", call.states_sizes(), "the states of wkv_with_states");
  Problem& p = call.problem;
  p.grad = call.input(grad, grad.type("sola::wkv: grad"));
  if (states.type("sola::wkv: states") != Type::float32) throw std::invalid_argument("sola::wkv: states must be float32");
  if (!states.contiguous()) states = states.copy(Type::float32);
  p.states = static_cast<float*>(const_cast<void*>(states.read()));
  Tensor grad_key = call.result(p.grad_key), grad_value = call.result(p.grad_value);
  std::vector<double> partial_decay(static_cast<size_t>(p.batch * p.channels)), partial_bonus = partial_decay;
  p.grad_decay = partial_decay.data(), p.grad_bonus = partial_bonus.data();
  if (!call.is_empty()) kernel.load()->backward(p, call.type, parallel_for);
  std::array<Tensor, 4> results{
      sum_over_images(partial_decay, p.batch, p.channels, call.decay.type("sola::wkv: decay")),
      sum_over_images(partial_bonus, p.batch, p.channels, call.bonus.type("sola::wkv: bonus")),
      call.cast(std::move(grad_key), call.key_type), call.cast(std::move(grad_value), call.value_type)};
  for (size_t i = 0; i < results.size(); ++i) stack[i] = results[i].release();
}

void register_operators(bool define) {
  void* library = nullptr;  // never deleted: that would unregister the operators
  if (define) {
    check(shim.aoti_torch_library_init_fragment("sola", __FILE__, __LINE__, &library), "open the library sola");
    for (const char* schema : schemas) check(shim.aoti_torch_library_def(library, schema), "define an operator");
    for (const char* schema : pass_schemas) check(shim.aoti_torch_library_def(library, schema), "define a pass");
    for (const char* schema : attention_schemas) check(shim.aoti_torch_library_def(library, schema), "define attention");
    for (const char* schema : linear_schemas) check(shim.aoti_torch_library_def(library, schema), "define a product");
  }
  check(shim.aoti_torch_library_init_impl("sola", "CPU", __FILE__, __LINE__, &library), "open the library sola");
  check(shim.torch_library_impl(library, "wkv", wkv, torch::abi_version), "register wkv");
  check(shim.torch_library_impl(library, "wkv_with_states", wkv_with_states, torch::abi_version),
        "register wkv_with_states");
  check(shim.torch_library_impl(library, "wkv_backward", wkv_backward, torch::abi_version), "register wkv_backward");
  for (const NamedKernel& pass : named_passes()) {
    check(shim.torch_library_impl(library, pass.name, pass.function, torch::abi_version), "register a pass");
  }
  for (const NamedKernel& each : named_attention()) {
    check(shim.torch_library_impl(library, each.name, each.function, torch::abi_version), "register attention");
  }
  for (const NamedKernel& each : named_linear()) {
    check(shim.torch_library_impl(library, each.name, each.function, torch::abi_version), "register a product");
  }
}

}  // namespace

void out_of_memory(size_t bytes) {
  throw std::runtime_error("sola: could not allocate " + std::to_string(bytes) +
                           " bytes of kernel workspace; use a smaller batch or image, or fewer threads");
}

const Passes& current_passes() { return *kernel.load()->passes; }
const AttentionKernels& current_attention() { return *kernel.load()->attention; }
const Linear& current_linear() { return *kernel.load()->linear; }
void prepare_bfloat16() {
#if defined(SOLA_BFLOAT16)
  const Kernel* current = &matrix_products;
  if (kernel == current && !request_matrix_unit()) kernel.compare_exchange_strong(current, &avx512_bf16::kernel);
#endif
}

}  // namespace sola

#define SOLA_EXPORT extern "C" __attribute__((visibility("default")))

// Register the kernels on the first call, and define the operators as well if define != 0. Return null or the error.
SOLA_EXPORT const char* sola_load(int define) {
  static std::string reason;
  if (sola::kernel != nullptr) return nullptr;
  try {
    reason = sola::torch::bind_torch();
    if (!reason.empty()) return reason.c_str();
    const sola::torch::Shim& shim = sola::torch::shim;
    sola::dtypes = {shim.aoti_torch_dtype_float64(), shim.aoti_torch_dtype_float32(), shim.aoti_torch_dtype_bfloat16(),
                    shim.aoti_torch_dtype_float16()};
    sola::kernel = sola::supported_kernels().back();
    sola::register_operators(define != 0);
    return nullptr;
  } catch (const std::exception& error) {
    sola::kernel = nullptr;
    reason = error.what();
    return reason.c_str();
  }
}

// Return the name of the active instruction set, after switching to `name` unless that is null. Return null if this CPU
// does not support it, or before sola_load.
SOLA_EXPORT const char* sola_instruction_set(const char* name) {
  if (name == nullptr) {
    const sola::Kernel* const current = sola::kernel;
    return current != nullptr ? current->name : nullptr;
  }
  for (const sola::Kernel* candidate : sola::supported_kernels()) {
    if (std::string(candidate->name) == name) {
      sola::kernel = candidate;
      return candidate->name;
    }
  }
  return nullptr;
}
