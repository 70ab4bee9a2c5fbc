// Runs a package that AOTInductor made of a frozen model, without Python: docs/elsewhere.md has the steps.
//
//     serve model.pt2 resnet_fused_cpu.so input.pt output.pt
//
// A package for a GPU takes resnet_fused_cuda.so, and a program that is linked with PyTorch's CUDA libraries (CMakeLists.txt).
// input.pt is a tensor that torch.save wrote; output.pt is the model's result, for torch.load.
#include <dlfcn.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/serialize.h>

static torch::Tensor read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("can't read ") + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::pickle_load(bytes).toTensor();
}

static void write(const torch::Tensor& tensor, const char* path) {
  const std::vector<char> bytes = torch::pickle_save(tensor);
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error(std::string("can't write ") + path);
}

int main(int argc, char** argv) try {
  if (argc != 5) throw std::runtime_error("usage: serve model.pt2 resnet_fused_cpu.so|resnet_fused_cuda.so input.pt output.pt");
  // Registers the operators that the package calls; stays loaded as long as the process.
  if (dlopen(argv[2], RTLD_NOW) == nullptr) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const torch::Device device(model.get_metadata().at("AOTI_DEVICE_KEY"));
  const std::vector<torch::Tensor> results = model.run({read(argv[3]).to(device)});
  write(results.at(0).cpu(), argv[4]);
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
