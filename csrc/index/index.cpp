// Sample index and blend of the Megatron order. Bit-identical to the numpy twins in
// megallm/data/megatron/order.py and megallm/data/megatron/blend.py; compile with -ffp-contract=off, since a fused
// multiply-add would round the blend's error once instead of twice.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Row k is (j, k * seq_len - c[j]) with c[j] <= k * seq_len < c[j + 1], c the running sum of the
// lengths of the shuffled sequences; row 0 is (0, 0).
template <typename Out>
static py::array_t<Out> fill_sample_index(const std::int32_t* lengths, std::int64_t num_lengths,
                                          const std::int32_t* order, std::int64_t num_ordered,
                                          std::int64_t seq_len, std::int64_t num_samples) {
  py::array_t<Out> result({num_samples + 1, std::int64_t{2}});
  Out* row = result.mutable_data();
  bool bad_sequence = false, too_short = false;
  {
    py::gil_scoped_release release;
    row[0] = row[1] = 0;
    std::int64_t j = -1, begin = 0, end = 0;
    for (std::int64_t k = 0; k <= num_samples && !too_short; ++k) {
      const std::int64_t token = k * seq_len;
      while (token >= end) {
        if (++j >= num_ordered) { too_short = true; break; }
        const std::int32_t sequence = order[j];
        if (sequence < 0 || sequence >= num_lengths) { bad_sequence = too_short = true; break; }
        begin = end;
        end += lengths[sequence];
      }
      if (k > 0 && !too_short) {
        row[2 * k] = static_cast<Out>(j);
        row[2 * k + 1] = static_cast<Out>(token - begin);
      }
    }
  }
  if (bad_sequence) throw std::invalid_argument("document_index names a sequence that does not exist");
  if (too_short) throw std::invalid_argument("the sequences hold fewer tokens than the samples need");
  return result;
}

static py::array build_sample_index(Array<std::int32_t> lengths, Array<std::int32_t> order, std::int64_t seq_len,
                                    std::int64_t num_samples, bool wide) {
  if (seq_len < 1 || num_samples < 0) throw std::invalid_argument("seq_len must be >= 1 and num_samples >= 0");
  if (lengths.ndim() != 1 || order.ndim() != 1) throw std::invalid_argument("lengths and order must have one dim");
  if (wide)
    return fill_sample_index<std::int64_t>(lengths.data(), lengths.size(), order.data(), order.size(), seq_len,
                                           num_samples);
  return fill_sample_index<std::int32_t>(lengths.data(), lengths.size(), order.data(), order.size(), seq_len,
                                         num_samples);
}

// Sample i comes from the source d with the largest weights[d] * max(i, 1) - taken[d], ties to the
// lowest d; a source leaves when it has given limits[d] samples.
static py::tuple build_blending_indices(Array<double> weights, std::int64_t size, Array<std::int64_t> limits) {
  const std::int64_t sources = weights.size();
  if (sources < 1 || sources > std::numeric_limits<std::int16_t>::max() || limits.size() != sources || size < 0)
    throw std::invalid_argument("one weight and one limit per source, 1 to 32767 sources");
  py::array_t<std::int16_t> source_of(size);
  py::array_t<std::int64_t> sample_of(size);
  const double* w = weights.data();
  const std::int64_t* limit = limits.data();
  std::int16_t* source = source_of.mutable_data();
  std::int64_t* sample = sample_of.mutable_data();
  bool exhausted = false;
  {
    py::gil_scoped_release release;
    std::vector<std::int64_t> taken(sources, 0);
    for (std::int64_t i = 0; i < size; ++i) {
      const double at = static_cast<double>(std::max<std::int64_t>(i, 1));
      std::int64_t best = -1;
      double best_error = 0.0;
      for (std::int64_t d = 0; d < sources; ++d) {
        if (taken[d] >= limit[d]) continue;
        const double error = w[d] * at - static_cast<double>(taken[d]);
        if (best < 0 || error > best_error) {
          best = d;
          best_error = error;
        }
      }
      if (best < 0) { exhausted = true; break; }
      source[i] = static_cast<std::int16_t>(best);
      sample[i] = taken[best]++;
    }
  }
  if (exhausted) throw std::invalid_argument("size is larger than the sum of the limits");
  return py::make_tuple(source_of, sample_of);
}

void bind_text(py::module_& m);  // text.cpp
void bind_repetition(py::module_& m);  // repetition.cpp
void bind_documents(py::module_& m);  // documents.cpp
void bind_language(py::module_& m);  // language.cpp

PYBIND11_MODULE(_index, m) {
  m.doc() = "Index arrays of the Megatron sample order, and words of texts; the numpy twins are in megallm";
  m.attr("VERSION") = 3;
  m.def("build_sample_index", &build_sample_index, py::arg("lengths"), py::arg("order"), py::arg("seq_len"),
        py::arg("num_samples"), py::arg("wide"), "int32 or (wide) int64 [num_samples + 1, 2]");
  m.def("build_blending_indices", &build_blending_indices, py::arg("weights"), py::arg("size"), py::arg("limits"),
        "(int16 source [size], int64 sample in the source [size])");
  bind_text(m);
  bind_repetition(m);
  bind_documents(m);
  bind_language(m);
}
