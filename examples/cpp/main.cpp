// Runs an encoder that `mlx-aimv2 export` wrote, on files of raw bytes: an image's RGB levels, or a text's token ids.
//
//   encode encoder.mlxfn uint8 224,224,3 image.rgb...                       prints a vector for each image
//   encode encoder.mlxfn uint8 224,224,3 image.rgb... --labels labels.tsv   prints the best label for each
//
// dtype and shape are those of "input" in encoder.json, and as many files go in at once as its "batches" say. A line of
// labels.tsv is a label; for vectors a tab and the label's own vector follow, as Python's encode_text gives it.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlx/mlx.h"

namespace mx = mlx::core;

struct Label {
  std::string name;
  std::vector<float> vector; // empty where the encoder itself gives a probability for each label
};

mx::Dtype dtype_of(const std::string& name) {
  if (name == "uint8") return mx::uint8;
  if (name == "int32") return mx::int32;
  if (name == "float32") return mx::float32;
  throw std::invalid_argument("dtype must be uint8, int32 or float32, got " + name);
}

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// The files one after another as one array (files, ...).
mx::array batch_of(const std::vector<std::string>& files, mx::Dtype dtype, mx::Shape shape) {
  shape.insert(shape.begin(), static_cast<int>(files.size()));
  mx::array batch = mx::zeros(shape, dtype);
  mx::eval(batch);
  size_t size = batch.nbytes() / files.size();
  for (size_t i = 0; i < files.size(); ++i) {
    auto bytes = read(files[i]);
    if (bytes.size() != size)
      throw std::invalid_argument(files[i] + " has " + std::to_string(bytes.size()) + " bytes, wanted " + std::to_string(size));
    std::memcpy(batch.data<char>() + i * size, bytes.data(), size);
  }
  return batch;
}

std::vector<Label> labels_of(const std::string& path) {
  auto bytes = read(path);
  std::istringstream text(std::string(bytes.begin(), bytes.end()));
  std::vector<Label> labels;
  for (std::string line; std::getline(text, line);) {
    auto tab = line.find('\t');
    Label label{line.substr(0, tab), {}};
    std::istringstream numbers(tab == std::string::npos ? "" : line.substr(tab));
    for (float number; numbers >> number;) label.vector.push_back(number);
    labels.push_back(label);
  }
  return labels;
}

// How well the i-th label fits: its cosine with the vector, or its probability.
float fit(const Label& label, const float* found, size_t width, size_t i) {
  if (label.vector.empty()) return i < width ? found[i] : 0;
  if (label.vector.size() != width) throw std::invalid_argument(label.name + " has a vector of another width");
  float product = 0, own = 0, other = 0;
  for (size_t k = 0; k < width; ++k) {
    product += found[k] * label.vector[k];
    own += found[k] * found[k];
    other += label.vector[k] * label.vector[k];
  }
  return product / std::sqrt(own * other);
}

int run(std::vector<std::string> words) {
  std::vector<Label> labels;
  if (words.size() > 2 && words[words.size() - 2] == "--labels") {
    labels = labels_of(words.back());
    words.resize(words.size() - 2);
  }
  if (words.size() < 4) throw std::invalid_argument("usage: encode FUNCTION DTYPE SHAPE FILE... [--labels FILE]");
  mx::Shape shape;
  std::istringstream lengths(words[2]);
  for (std::string length; std::getline(lengths, length, ',');) shape.push_back(std::stoi(length));
  std::vector<std::string> files(words.begin() + 3, words.end());

  auto encode = mx::import_function(words[0]);
  auto found = mx::contiguous(mx::astype(encode({batch_of(files, dtype_of(words[1]), shape)})[0], mx::float32));
  mx::eval(found);
  size_t width = found.size() / files.size();
  for (size_t i = 0; i < files.size(); ++i) {
    const float* own = found.data<float>() + i * width;
    if (labels.empty()) {
      for (size_t k = 0; k < width; ++k) std::cout << own[k] << (k + 1 < width ? ' ' : '\n');
      continue;
    }
    size_t best = 0;
    for (size_t k = 1; k < labels.size(); ++k)
      if (fit(labels[k], own, width, k) > fit(labels[best], own, width, best)) best = k;
    std::cout << files[i] << '\t' << labels[best].name << '\t' << fit(labels[best], own, width, best) << '\n';
  }
  return 0;
}

int main(int argc, char** argv) {
  std::cout.precision(9);
  try {
    return run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    // Of a number of files that was not exported MLX says so in a sentence, and then lists what the function takes.
    std::string line = error.what();
    bool unmatched = line.find("No imported function") != std::string::npos;
    std::cerr << "encode: " << line.substr(0, line.find_first_of(unmatched ? ".\n" : "\n"))
              << (unmatched ? ": the file's .json says how many of which shape go in" : "") << '\n';
    return 2;
  }
}
