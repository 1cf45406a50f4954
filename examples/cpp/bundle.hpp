// A bundle that was exported with target "aoti", run from C++: a loop over the schedule in its manifest.
//
// All graphs read the same weights, mapped from the bundle's file. A Bundle may be used from several threads; a
// Generation belongs to one. Sizes of files are looked at here; `omnifx bundle DIR` compares their hashes as well.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace omnifx {

using Json = nlohmann::ordered_json;  // the order of a graph's inputs and outputs is that of the manifest
using Tensors = std::map<std::string, at::Tensor>;
using Path = std::filesystem::path;

inline at::ScalarType dtype_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
      {"int64", at::kLong},     {"int32", at::kInt},     {"int16", at::kShort},  {"int8", at::kChar},
      {"uint8", at::kByte},     {"bool", at::kBool}};
  return known.at(name);
}

// A file's pages in memory, read only; all processes share them.
class MappedFile {
 public:
  explicit MappedFile(const Path& path) {
    const int file = open(path.c_str(), O_RDONLY);
    struct stat about {};
    if (file < 0 || fstat(file, &about) != 0) throw std::runtime_error(path.string() + " cannot be read");
    size_ = static_cast<size_t>(about.st_size);
    data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (data_ == MAP_FAILED) throw std::runtime_error(path.string() + " cannot be mapped");
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile() { munmap(data_, size_); }

  char* data() const { return static_cast<char*>(data_); }
  size_t size() const { return size_; }

  // The tensor at an offset; it is not copied, and lives as long as the file is mapped.
  at::Tensor tensor(size_t offset, const std::vector<int64_t>& shape, at::ScalarType dtype) const {
    size_t bytes = at::elementSize(dtype);
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    if (offset > size_ || bytes > size_ - offset) throw std::runtime_error("a tensor lies beyond the end of its file");
    return at::from_blob(data() + offset, shape, at::TensorOptions().dtype(dtype));
  }

 private:
  size_t size_ = 0;
  void* data_ = nullptr;
};

// What one generation holds between its steps.
struct Generation {
  size_t step = 0;
  Tensors buffers;
};

class Bundle {
 public:
  // num_runners: runs of one graph that may be under way at once; they share its weights.
  explicit Bundle(Path folder, size_t num_runners = 1) : folder_(std::move(folder)) {
    std::ifstream file(folder_ / "manifest.json");
    if (!file) throw std::runtime_error(folder_.string() + " is no bundle: its manifest.json cannot be read");
    file >> manifest_;
    if (manifest_.at("format") != 1) throw std::runtime_error("this bundle has a format that is not known here");
    const Json& engine = manifest_.at("engines").at("aoti");
    const std::string made_with = engine.at("builder").at("torch");
    if (made_with.substr(0, made_with.find('+')) != TORCH_VERSION)
      throw std::runtime_error("this bundle was compiled with torch " + made_with + ", not " + TORCH_VERSION);
    device_ = at::Device(engine.at("builder").at("device").get<std::string>());
    weights_ = std::make_unique<MappedFile>(checked(manifest_.at("weights")));
    constants_ = stored(manifest_.value("constants", Json::object()));
    load_graphs(engine, num_runners);
  }

  const Json& manifest() const { return manifest_; }
  size_t num_steps() const { return manifest_.at("steps").size(); }

  // A file of the manifest. It must lie in the folder, and have its size.
  Path file(const Json& info) const { return checked(info); }

  // One call of the model: its arguments by path, contiguous, in; its outputs out.
  std::vector<at::Tensor> step(Generation& generation, const Tensors& arguments) {
    std::map<size_t, at::Tensor> outputs;
    if (generation.step == 0) {
      for (const auto& [name, info] : manifest_.at("buffers").items()) generation.buffers[name] = empty(info);
      for (const Json& run : manifest_.value("prologue", Json::array())) this->run(run, generation, arguments, outputs);
    }
    const Json& step = manifest_.at("steps").at(generation.step);
    for (const Json& run : step.at("runs")) this->run(run, generation, arguments, outputs);
    for (const Json& keep : step.value("keeps", Json::array())) {
      const std::string buffer = keep.at("buffer");
      const Json& info = manifest_.at("buffers").at(buffer);
      generation.buffers.at(buffer).copy_(value(keep.at("source"), info, generation, arguments, outputs));
    }
    ++generation.step;
    std::vector<at::Tensor> found;
    for (const auto& [number, output] : outputs) found.push_back(output);
    return found;
  }

 private:
  using Loader = torch::inductor::AOTIModelPackageLoader;

  Path checked(const Json& file) const {
    const Path inside = file.at("path").get<std::string>();
    if (inside.is_absolute() || std::find(inside.begin(), inside.end(), "..") != inside.end())
      throw std::runtime_error(inside.string() + " is not in the bundle's folder");
    const Path path = folder_ / inside;
    if (std::filesystem::file_size(path) != file.at("bytes"))
      throw std::runtime_error(path.string() + " was cut off or changed");
    return path;
  }

  Tensors stored(const Json& infos) const {
    Tensors found;
    for (const auto& [name, info] : infos.items()) {
      const auto shape = info.at("shape").get<std::vector<int64_t>>();
      found[name] = weights_->tensor(info.at("offset"), shape, dtype_of(info.at("dtype"))).to(device_);
    }
    return found;
  }

  void load_graphs(const Json& engine, size_t num_runners) {
    tensors_ = stored(engine.at("weights"));
    for (const auto& [name, file] : engine.at("files").items()) {
      auto loader = std::make_unique<Loader>(checked(file).string(), name, false, num_runners, device_.index());
      std::unordered_map<std::string, at::Tensor> given;
      for (const std::string& key : loader->get_constant_fqns()) {
        const auto own = tensors_.find(name + ":" + key);
        given[key] = own != tensors_.end() ? own->second : tensors_.at(key);
      }
      // user_managed: the graph reads these very tensors, and holds none of its own
      if (!given.empty()) loader->load_constants(given, false, true, /*user_managed=*/true);
      graphs_[name] = std::move(loader);
    }
  }

  at::Tensor empty(const Json& info) const {
    const auto options = at::TensorOptions().dtype(dtype_of(info.at("dtype"))).device(device_);
    return at::empty(info.at("shape").get<std::vector<int64_t>>(), options);
  }

  at::Tensor value(const Json& source, const Json& info, const Generation& generation, const Tensors& arguments,
                   const std::map<size_t, at::Tensor>& outputs) const {
    if (source.contains("call")) return arguments.at(source.at("call").get<std::string>());
    if (source.contains("buffer")) return generation.buffers.at(source.at("buffer").get<std::string>());
    if (source.contains("output")) return outputs.at(source.at("output").get<size_t>());
    if (source.contains("constant")) return constants_.at(source.at("constant").get<std::string>());
    const auto options = at::TensorOptions().dtype(dtype_of(info.at("dtype"))).device(device_);
    if (source.contains("numbers")) return at::tensor(source.at("numbers").get<std::vector<double>>()).to(options);
    return at::full(info.at("shape").get<std::vector<int64_t>>(), source.at("fill").get<double>(), options);
  }

  void run(const Json& run, Generation& generation, const Tensors& arguments, std::map<size_t, at::Tensor>& outputs) {
    const std::string name = run.at("variant");
    const Json& variant = manifest_.at("variants").at(name);
    std::vector<at::Tensor> inputs;
    for (const auto& [key, info] : variant.at("inputs").items())
      inputs.push_back(value(run.at("inputs").at(key), info, generation, arguments, outputs));
    std::vector<at::Tensor> made = graphs_.at(name)->boxed_run(std::move(inputs));
    size_t position = 0;
    for (const auto& [key, info] : variant.at("outputs").items()) {
      const Json& target = run.at("outputs").at(key);
      at::Tensor& output = made.at(position++);
      if (target.contains("buffer")) generation.buffers[target.at("buffer")] = output;  // handed over, not copied
      else if (target.contains("output")) outputs[target.at("output")] = output;
    }
  }

  Path folder_;
  Json manifest_;
  at::Device device_ = at::kCPU;
  std::unique_ptr<MappedFile> weights_;
  Tensors tensors_, constants_;
  std::map<std::string, std::unique_ptr<Loader>> graphs_;
};

}  // namespace omnifx
