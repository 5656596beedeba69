// What the functions over texts share: arrays, classes of characters, and how a hash is mixed.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using U64 = std::uint64_t;
using I64 = std::int64_t;

// Bits of a character's class, as in megallm/curate/text.py.
constexpr std::uint8_t kWord = 1, kSpace = 4, kSolo = 8, kDigit = 16, kStop = 32, kSymbol = 64;

inline U64 mix(U64 x) {
  x ^= x >> 33;
  x *= 0xFF51AFD7ED558CCDull;
  x ^= x >> 33;
  x *= 0xC4CEB9FE1A85EC53ull;
  return x ^ (x >> 33);
}

template <typename T>
py::array_t<T> array_of(const std::vector<T>& values) {
  py::array_t<T> out(static_cast<py::ssize_t>(values.size()));
  if (!values.empty()) std::memcpy(out.mutable_data(), values.data(), values.size() * sizeof(T));
  return out;
}

// How many texts `offsets` divides `size` pieces (or characters) into.
inline I64 texts_of(const Array<I64>& offsets, I64 size) {
  const I64 *offset = offsets.data(), texts = offsets.size() - 1;
  bool inside = texts >= 0 && offset[0] >= 0 && offset[texts] <= size;
  for (I64 text = 0; inside && text < texts; ++text) inside = offset[text] <= offset[text + 1];
  if (!inside) throw std::invalid_argument("offsets must rise and lie inside what they divide");
  return texts;
}
