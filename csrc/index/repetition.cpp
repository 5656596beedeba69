// Repetition and similarity: n-grams of pieces (words, lines), which of them repeat, and MinHash values of their sets.
// Each function gives the same integers as its numpy twin: megallm/curate/text.py, repetition.py, near.py.

#include "text.hpp"

#include <algorithm>
#include <stdexcept>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

namespace {

constexpr U64 kNgramBase = 0xD6E8FEB86659FD93ull;
constexpr int kTopFirst = 2, kTopLast = 4, kDuplicateLast = 10;

// n-grams of `size` pieces inside one document: their hashes, and the number of the first piece of each.
py::tuple ngrams(Array<U64> hashes, Array<I64> offsets, I64 size) {
  const U64* hash = hashes.data();
  const I64 *offset = offsets.data(), texts = texts_of(offsets, hashes.size());
  if (size < 1) throw std::invalid_argument("size must be at least 1");
  I64 count = 0;
  for (I64 text = 0; text < texts; ++text) count += std::max<I64>(offset[text + 1] - offset[text] - size + 1, 0);
  Array<U64> grams(count);
  Array<I64> firsts(count);
  U64* gram = grams.mutable_data();
  I64* first = firsts.mutable_data();
  for (I64 text = 0; text < texts; ++text)
    for (I64 i = offset[text]; i + size <= offset[text + 1]; ++i) {
      U64 total = 0;
      for (I64 k = size - 1; k >= 0; --k) total = total * kNgramBase + hash[i + k];
      *gram++ = mix(total), *first++ = i;
    }
  return py::make_tuple(grams, firsts);
}

// One document's n-grams: which begin where an equal one began before, and which occur at least twice.
class Repeats {
 public:
  // `gram` [count] are equal for equal n-grams.
  void find(const std::vector<U64>& gram) {
    if (gram.size() >= kNone) throw std::length_error("a document of over 4 billion pieces");
    const auto size = static_cast<std::uint32_t>(gram.size());
    int bits = 4;
    while ((std::size_t{1} << bits) < 2 * gram.size()) ++bits;
    const std::size_t last = (std::size_t{1} << bits) - 1;
    slots_.assign(last + 1, Slot{0, kNone});
    counts_.assign(size, 0), first_.resize(size);
    for (std::uint32_t i = 0; i < size; ++i) {
      std::size_t at = gram[i] * 0x9E3779B97F4A7C15ull >> (64 - bits);
      while (slots_[at].first != kNone && slots_[at].gram != gram[i]) at = (at + 1) & last;
      if (slots_[at].first == kNone) slots_[at] = Slot{gram[i], i};
      first_[i] = slots_[at].first;
      ++counts_[first_[i]];
    }
  }
  I64 count(std::size_t i) const { return counts_[first_[i]]; }
  bool later(std::size_t i) const { return first_[i] != i; }

 private:
  static constexpr std::uint32_t kNone = 0xFFFFFFFFu;
  struct Slot {
    U64 gram;
    std::uint32_t first;
  };
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> counts_, first_;  // by n-gram: how many are equal to it, and the first of them
};

// Characters of the most frequent n-gram (sizes 2 to 4), and of all that repeated n-grams (5 to 10) cover:
// [3 + 6, texts].
Array<I64> repetition(Array<U64> hashes, Array<I64> begin, Array<I64> end, Array<I64> offsets) {
  const U64* hash = hashes.data();
  const I64 *low = begin.data(), *high = end.data(), *offset = offsets.data();
  const I64 texts = texts_of(offsets, hashes.size());
  if (begin.size() != hashes.size() || end.size() != hashes.size())
    throw std::invalid_argument("begin, end and hashes must have the same length");
  Array<I64> out({static_cast<py::ssize_t>(kDuplicateLast - kTopFirst + 1), static_cast<py::ssize_t>(texts)});
  I64* to = out.mutable_data();
  std::fill(to, to + out.size(), I64{0});
  Repeats repeats;
  std::vector<U64> gram;
  std::vector<I64> first, kept_first;
  std::vector<U64> kept;
  for (I64 text = 0; text < texts; ++text) {
    const I64 from = offset[text], until = offset[text + 1];
    gram.clear(), first.clear();
    for (I64 i = from; i + kTopFirst <= until; ++i) gram.push_back(hash[i]), first.push_back(i);
    U64 power = 1;
    for (int size = kTopFirst; size <= kDuplicateLast && !first.empty(); ++size) {
      power *= kNgramBase;  // of the piece that the n-grams grow by
      std::size_t left = 0;
      for (std::size_t i = 0; i < first.size(); ++i)
        if (first[i] + size <= until) {
          gram[left] = gram[i] + hash[first[i] + size - 1] * power, first[left] = first[i];
          ++left;
        }
      gram.resize(left), first.resize(left);
      repeats.find(gram);
      I64* row = to + (size - kTopFirst) * texts + text;
      if (size <= kTopLast) {
        I64 most = 1, chars = 0;
        for (std::size_t i = 0; i < left; ++i) {
          const I64 count = repeats.count(i);
          if (repeats.later(i) || count < most || count < 2) continue;
          I64 length = 0;
          for (int k = 0; k < size; ++k) length += high[first[i] + k] - low[first[i] + k];
          if (count > most || count * length > chars) most = count, chars = count * length;
        }
        *row = chars;
      } else {
        I64 covered = from;  // all pieces before are counted, where they are covered
        for (std::size_t i = 0; i < left; ++i) {
          if (!repeats.later(i)) continue;
          for (covered = std::max(covered, first[i]); covered < first[i] + size; ++covered)
            *row += high[covered] - low[covered];
        }
      }
      kept.clear(), kept_first.clear();
      for (std::size_t i = 0; i < left; ++i)
        if (repeats.count(i) > 1) kept.push_back(gram[i]), kept_first.push_back(first[i]);
      gram.swap(kept), first.swap(kept_first);
    }
  }
  return out;
}

// How many pieces of each document are repeats of earlier ones, and how many characters they have: [2, texts].
Array<I64> duplicates(Array<U64> hashes, Array<I64> begin, Array<I64> end, Array<I64> offsets) {
  const U64* hash = hashes.data();
  const I64 *low = begin.data(), *high = end.data(), *offset = offsets.data();
  const I64 texts = texts_of(offsets, hashes.size());
  if (begin.size() != hashes.size() || end.size() != hashes.size())
    throw std::invalid_argument("begin, end and hashes must have the same length");
  Array<I64> out({py::ssize_t{2}, static_cast<py::ssize_t>(texts)});
  I64* to = out.mutable_data();
  Repeats repeats;
  std::vector<U64> gram;
  for (I64 text = 0; text < texts; ++text) {
    gram.assign(hash + offset[text], hash + offset[text + 1]);
    repeats.find(gram);
    I64 count = 0, chars = 0;
    for (std::size_t i = 0; i < gram.size(); ++i)
      if (repeats.later(i)) ++count, chars += high[offset[text] + i] - low[offset[text] + i];
    to[text] = count, to[texts + text] = chars;
  }
  return out;
}

WIDE void least_of(const std::uint32_t* value, I64 count, std::uint32_t flip, std::uint32_t factor,
                   std::uint32_t* result) {
  std::uint32_t least = 0xFFFFFFFFu;
  for (I64 i = 0; i < count; ++i) {
    const std::uint32_t found = (value[i] ^ flip) * factor;
    least = found < least ? found : least;
  }
  *result = least;
}

// uint64 [sets, bands] before the last mixing; `multipliers` [bands x rows, 2] are (factor, flip).
Array<U64> bands(Array<std::uint32_t> values, Array<I64> offsets, Array<std::uint32_t> multipliers, I64 rows) {
  const std::uint32_t *value = values.data(), *multiplier = multipliers.data();
  const I64 *offset = offsets.data(), sets = texts_of(offsets, values.size()), all = multipliers.size() / 2;
  if (rows < 1 || all % rows) throw std::invalid_argument("rows must divide the multipliers into bands");
  Array<U64> out({static_cast<py::ssize_t>(sets), static_cast<py::ssize_t>(all / rows)});
  U64* to = out.mutable_data();
  for (I64 set = 0; set < sets; ++set)
    for (I64 band = 0; band < all / rows; ++band) {
      U64 total = 0;
      for (I64 k = band * rows; k < (band + 1) * rows; ++k) {
        std::uint32_t least;
        least_of(value + offset[set], offset[set + 1] - offset[set], multiplier[2 * k + 1], multiplier[2 * k], &least);
        total = total * 0x9FB21C651E98DF25ull + least + 1;
      }
      *to++ = total;
    }
  return out;
}

}  // namespace

void bind_repetition(py::module_& m) {
  m.def("ngrams", &ngrams, "(hash uint64, first piece int64) of the n-grams inside documents");
  m.def("repetition", &repetition, "int64 [9, texts]: characters of the top 2- to 4-grams, covered by 5- to 10-grams");
  m.def("duplicates", &duplicates, "int64 [2, texts]: repeated pieces, and their characters");
  m.def("bands", &bands, "uint64 [sets, bands]: MinHash values mixed by band");
}
