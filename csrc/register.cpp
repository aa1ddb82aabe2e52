// SPDX-License-Identifier: Apache-2.0
// The operators for the dispatch key CPU: checks and memory of sola::wkv, the choice of an instruction set.
// Nothing happens before sola_load is called: Python calls it after it has defined the operators, a C++ program that
// runs an exported graph without Python calls sola_load(1), which defines them too.
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
Kernel with(Kernel kernel, const char* name, const Linear& linear, const Attend& attend) {
  kernel.name = name, kernel.linear = &linear, kernel.attend = &attend;
  return kernel;
}
const Kernel dot_products = with(avx512::kernel, "avx512_bf16", avx512_bf16::linear, avx512_bf16::attend);
const Kernel matrix_products = with(avx512::kernel, "amx", amx::linear, avx512::attend);

// Whether there are tiles of bfloat16, which Linux has to be asked for.
constexpr long tile_data = 18;
bool has_matrix_unit() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  constexpr uint32_t bf16_and_tiles = 1u << 22 | 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16_and_tiles) != bf16_and_tiles) return false;
#if defined(__linux__)
  constexpr long what_is_supported = 0x1021;
  uint64_t supported = 0;
  return syscall(SYS_arch_prctl, what_is_supported, &supported) == 0 && (supported >> tile_data & 1) != 0;
#else
  return false;
#endif
}

// From then on signals need a larger stack of their own, so nobody is asked before a product needs it.
bool may_use_matrix_unit() {
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
// GCC 10 and Clang 13 do not know it by name
bool has_f16c() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 29 & 1) != 0;
}
#endif

// what this machine can run, best last
std::vector<const Kernel*> available() {
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
        all.push_back(&dot_products);
        if (has_matrix_unit()) all.push_back(&matrix_products);
      }
#endif
    }
  }
#endif
  return all;
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
    expect(decay, "sola::wkv: decay", {sizes[2]}, "[channels]");
    expect(bonus, "sola::wkv: bonus", {sizes[2]}, "[channels]");
    expect(value, "sola::wkv: value", sizes, "key's size");
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

  // the kernel in float64 keeps none
  std::vector<int64_t> states_sizes() const {
    if (type == Type::float64) return {0};
    return {sizes[0], (sizes[1] + chunk_tokens - 1) / chunk_tokens, 4, sizes[2]};
  }

  Tensor as(Tensor made, Type own) const { return own == type ? std::move(made) : made.copy(own); }
};

Tensor forward(Call& call) {
  Tensor output = call.result(call.problem.output);
  if (!call.nothing()) kernel.load()->forward(call.problem, call.type, parallel_for);
  return call.as(std::move(output), call.value_type);
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
  expect(grad, "sola::wkv: grad", call.sizes, "value's size");
  expect(states, "sola::wkv: states", call.states_sizes(), "what wkv_with_states makes of them");
  Problem& p = call.problem;
  p.grad = call.input(grad, grad.type("sola::wkv: grad"));
  if (states.type("sola::wkv: states") != Type::float32) throw std::invalid_argument("sola::wkv: states must be float32");
  if (!states.contiguous()) states = states.copy(Type::float32);
  p.states = static_cast<float*>(const_cast<void*>(states.read()));
  Tensor grad_key = call.result(p.grad_key), grad_value = call.result(p.grad_value);
  std::vector<double> partial_decay(static_cast<size_t>(p.batch * p.channels)), partial_bonus = partial_decay;
  p.grad_decay = partial_decay.data(), p.grad_bonus = partial_bonus.data();
  if (!call.nothing()) kernel.load()->backward(p, call.type, parallel_for);
  std::array<Tensor, 4> results{total(partial_decay, p.batch, p.channels, call.decay.type("sola::wkv: decay")),
                                total(partial_bonus, p.batch, p.channels, call.bonus.type("sola::wkv: bonus")),
                                call.as(std::move(grad_key), call.key_type),
                                call.as(std::move(grad_value), call.value_type)};
  for (size_t i = 0; i < results.size(); ++i) stack[i] = results[i].release();
}

void register_operators(bool define) {
  void* library = nullptr;  // never deleted: that would take the operators away
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
  throw std::runtime_error("sola: no memory for the " + std::to_string(bytes) +
                           " bytes that a kernel works in; give it a smaller batch or image, or fewer threads");
}

const Passes& current_passes() { return *kernel.load()->passes; }
const Attend& current_attend() { return *kernel.load()->attend; }
const Linear& current_linear() { return *kernel.load()->linear; }
void need_bfloat16() {
#if defined(SOLA_BFLOAT16)
  const Kernel* used = &matrix_products;
  if (kernel == used && !may_use_matrix_unit()) kernel.compare_exchange_strong(used, &dot_products);
#endif
}

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
  if (name == nullptr) {
    const sola::Kernel* const used = sola::kernel;
    return used != nullptr ? used->name : nullptr;
  }
  for (const sola::Kernel* candidate : sola::available()) {
    if (std::string(candidate->name) == name) {
      sola::kernel = candidate;
      return candidate->name;
    }
  }
  return nullptr;
}
