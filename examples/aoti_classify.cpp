// SPDX-License-Identifier: Apache-2.0
// Runs an AOTInductor package without Python: aoti_classify model.pt2 _kernel.so HEIGHT WIDTH prints the logits of an
// image of ones. model.pt2 is written by `sola export sola_nano --format aoti --out model.pt2`, _kernel.so is in
// sola_vision/ops; docs/export.md has the command that compiles this file.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdlib>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: aoti_classify model.pt2 _kernel.so HEIGHT WIDTH\n";
    return 2;
  }
  void* kernel = dlopen(argv[2], RTLD_NOW);
  auto load = reinterpret_cast<const char* (*)(int)>(kernel != nullptr ? dlsym(kernel, "sola_load") : nullptr);
  if (load == nullptr) {
    std::cerr << dlerror() << '\n';
    return 2;
  }
  // 1: also define the operators, which Python does otherwise
  if (const char* reason = load(1)) {
    std::cerr << reason << '\n';
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  // an image must be contiguous float32, as this one is: the package does not check
  const std::vector<at::Tensor> results = model.run({torch::ones({1, 3, std::atoi(argv[3]), std::atoi(argv[4])})});
  const at::Tensor logits = results[0].contiguous();
  for (int64_t i = 0; i < logits.numel(); ++i) std::cout << logits.data_ptr<float>()[i] << '\n';
}
