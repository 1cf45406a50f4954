// Runs the first steps of a bundle as its reference holds them, and compares: run_bundle DIR [most allowed, 1e-4].
//
// Prints the largest distance from what PyTorch gave, over an output's norm; the exit status is 1 if it is too large.
#include <ATen/TensorOperators.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iostream>

#include "bundle.hpp"

// The tensors of a safetensors file: eight bytes for the length of a header in JSON, the header, the values.
omnifx::Tensors read_safetensors(const omnifx::MappedFile& file) {
  static const std::map<std::string, at::ScalarType> types = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}, {"I64", at::kLong},
      {"I32", at::kInt},    {"I16", at::kShort}, {"I8", at::kChar},  {"U8", at::kByte},       {"BOOL", at::kBool}};
  uint64_t length = 0;
  if (file.size() < sizeof length) throw std::runtime_error("the reference is cut off");
  std::memcpy(&length, file.data(), sizeof length);
  if (length > file.size() - sizeof length) throw std::runtime_error("the reference is cut off");
  const char* header = file.data() + sizeof length;
  const omnifx::Json infos = omnifx::Json::parse(header, header + length);
  omnifx::Tensors found;
  for (const auto& [name, info] : infos.items()) {
    if (name == "__metadata__") continue;
    const size_t offset = sizeof length + length + info.at("data_offsets").at(0).get<size_t>();
    found[name] = file.tensor(offset, info.at("shape").get<std::vector<int64_t>>(), types.at(info.at("dtype")));
  }
  return found;
}

// The arguments of a step: those that change from step to step, else those of all steps; the timestep is the plan's.
omnifx::Tensors arguments_of(const omnifx::Json& manifest, const omnifx::Tensors& reference, size_t step) {
  omnifx::Tensors found;
  for (const auto& [name, info] : manifest.at("call").at("inputs").items()) {
    const auto own = reference.find("input." + std::to_string(step) + "." + name);
    const at::Tensor& value = own != reference.end() ? own->second : reference.at("input." + name);
    const bool timed = info.at("role") == "timestep";
    found[name] = timed ? value.clone().fill_(manifest.at("steps").at(step).at("timestep").get<double>()) : value;
  }
  return found;
}

int main(int count, char** words) try {
  if (count < 2) throw std::runtime_error("usage: run_bundle DIR [most allowed, 1e-4]");
  const omnifx::Path folder = words[1];
  const double allowed = count > 2 ? std::stod(words[2]) : 1e-4;
  const c10::InferenceMode no_gradients;

  omnifx::Bundle bundle(folder);
  const omnifx::Json& manifest = bundle.manifest();
  const omnifx::MappedFile file(bundle.file(manifest.at("reference")));
  const omnifx::Tensors reference = read_safetensors(file);

  omnifx::Generation generation;
  double worst = 0.0;
  size_t compared = 0;
  while (generation.step < bundle.num_steps()) {
    const std::string stem = "output." + std::to_string(generation.step) + ".";
    if (!reference.contains(stem + "0")) break;
    const auto outputs = bundle.step(generation, arguments_of(manifest, reference, generation.step));
    for (size_t i = 0; i < outputs.size(); ++i, ++compared) {
      const at::Tensor got = outputs[i].to(at::kCPU, at::kDouble);
      const at::Tensor expected = reference.at(stem + std::to_string(i)).to(at::kDouble);
      const double error = (got - expected).norm().item<double>() / expected.norm().item<double>();
      worst = std::max(worst, std::isnan(error) ? INFINITY : error);
    }
  }
  std::printf("%zu of %zu steps, largest difference from PyTorch: %.1e of an output's norm\n", generation.step,
              bundle.num_steps(), worst);
  return compared > 0 && worst <= allowed ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "run_bundle: " << error.what() << "\n";
  return 2;
}
