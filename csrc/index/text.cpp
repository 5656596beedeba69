// Words, lines, n-grams and repetition of a batch of texts. Each function gives the same integers as its numpy twin:
// megallm/curate/text.py, quality.py, repetition.py, near.py, exact.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using U64 = std::uint64_t;
using I64 = std::int64_t;

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

namespace {

// Bits of a character's class, as in megallm/curate/text.py.
constexpr std::uint8_t kWord = 1, kLetter = 2, kSpace = 4, kSolo = 8, kDigit = 16, kStop = 32;
constexpr U64 kNgramBase = 0xD6E8FEB86659FD93ull;
constexpr int kTopFirst = 2, kTopLast = 4, kDuplicateLast = 10;

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

// The polynomial of the characters [begin, end) with rising powers of `base`, mixed.
inline U64 hash_of(const std::uint32_t* codes, I64 begin, I64 end, U64 base) {
  U64 total = 0;
  for (I64 i = end - 1; i >= begin; --i) total = total * base + codes[i] + 1;
  return mix(total);
}

py::tuple words(Array<std::uint32_t> codes, Array<std::uint8_t> kinds, U64 base) {
  if (codes.size() != kinds.size()) throw std::invalid_argument("codes and kinds must have the same length");
  const std::uint32_t* code = codes.data();
  const std::uint8_t* kind = kinds.data();
  const I64 size = codes.size();
  std::vector<I64> begins, ends;
  std::vector<U64> hashes;
  std::vector<std::uint8_t> classes;
  {
    begins.reserve(size / 5), ends.reserve(size / 5), hashes.reserve(size / 5), classes.reserve(size / 5);
    for (I64 i = 0; i < size;) {
      if (!(kind[i] & kWord)) { ++i; continue; }
      I64 end = i + 1;
      std::uint8_t is = kind[i];
      if (!(is & kSolo))
        for (; end < size && (kind[end] & kWord) && !(kind[end] & kSolo); ++end) is |= kind[end];
      begins.push_back(i), ends.push_back(end), hashes.push_back(hash_of(code, i, end, base)), classes.push_back(is);
      i = end;
    }
  }
  return py::make_tuple(array_of(begins), array_of(ends), array_of(hashes), array_of(classes));
}

// Lines without the space around them, and which of them stand after a blank line (or at the beginning of a text).
py::tuple lines(Array<std::uint32_t> codes, Array<std::uint8_t> kinds, Array<I64> starts) {
  if (codes.size() != kinds.size()) throw std::invalid_argument("codes and kinds must have the same length");
  const std::uint32_t* code = codes.data();
  const std::uint8_t* kind = kinds.data();
  const I64* start = starts.data();
  const I64 size = codes.size(), texts = starts.size() - 1;
  std::vector<I64> begins, ends;
  std::vector<std::uint8_t> after_blank;
  {
    for (I64 text = 0; text < texts; ++text) {
      I64 newlines = 2;  // since the last line that is not blank
      const I64 stop = std::min(start[text + 1], size);
      for (I64 at = start[text]; at < stop;) {
        I64 first = -1, last = -1;
        for (; at < stop && code[at] != '\n'; ++at)
          if (!(kind[at] & kSpace)) {
            if (first < 0) first = at;
            last = at;
          }
        ++at;
        if (first >= 0) {
          begins.push_back(first), ends.push_back(last + 1), after_blank.push_back(newlines > 1);
          newlines = 0;
        }
        ++newlines;
      }
    }
  }
  return py::make_tuple(array_of(begins), array_of(ends), array_of(after_blank));
}

Array<U64> hashes(Array<std::uint32_t> codes, Array<I64> begin, Array<I64> end, U64 base) {
  Array<U64> out(begin.size());
  const std::uint32_t* code = codes.data();
  const I64 *low = begin.data(), *high = end.data(), count = begin.size(), size = codes.size();
  if (end.size() != count) throw std::invalid_argument("begin and end must have the same length");
  for (I64 i = 0; i < count; ++i)
    if (low[i] < 0 || high[i] > size) throw std::invalid_argument("a run of characters outside the text");
  U64* to = out.mutable_data();
  for (I64 i = 0; i < count; ++i) to[i] = hash_of(code, low[i], high[i], base);
  return out;
}

// n-grams of `size` pieces inside one document: their hashes, and the number of the first piece of each.
py::tuple ngrams(Array<U64> hashes, Array<I64> offsets, I64 size) {
  const U64* hash = hashes.data();
  const I64 *offset = offsets.data(), texts = offsets.size() - 1;
  if (size < 1 || texts < 0 || (texts > 0 && offset[texts] > hashes.size()))
    throw std::invalid_argument("size must be at least 1, and offsets must lie inside the pieces");
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
    std::size_t wanted = 16;
    while (wanted < 2 * gram.size()) wanted *= 2;
    slots_.assign(wanted, kNone);
    counts_.assign(size, 0), first_.resize(size);
    for (std::uint32_t i = 0; i < size; ++i) {
      std::size_t at = mix(gram[i]) & (wanted - 1);
      while (slots_[at] != kNone && gram[slots_[at]] != gram[i]) at = (at + 1) & (wanted - 1);
      if (slots_[at] == kNone) slots_[at] = i;
      first_[i] = slots_[at];
      ++counts_[first_[i]];
    }
  }
  I64 count(std::size_t i) const { return counts_[first_[i]]; }
  bool later(std::size_t i) const { return first_[i] != i; }

 private:
  static constexpr std::uint32_t kNone = 0xFFFFFFFFu;
  std::vector<std::uint32_t> slots_, counts_, first_;  // by hash: the first n-gram; by n-gram: how many, and the first
};

// Characters of the most frequent n-gram (sizes 2 to 4), and of all that repeated n-grams (5 to 10) cover: [3 + 6, texts].
Array<I64> repetition(Array<U64> hashes, Array<I64> begin, Array<I64> end, Array<I64> offsets) {
  const U64* hash = hashes.data();
  const I64 *low = begin.data(), *high = end.data(), *offset = offsets.data(), texts = offsets.size() - 1;
  if (texts < 0 || begin.size() != hashes.size() || end.size() != hashes.size() || offset[texts] > hashes.size())
    throw std::invalid_argument("begin, end and hashes must have the same length, and offsets lie inside");
  Array<I64> out({static_cast<py::ssize_t>(kDuplicateLast - kTopFirst + 1), static_cast<py::ssize_t>(texts)});
  I64* to = out.mutable_data();
  std::fill(to, to + out.size(), I64{0});
  Repeats repeats;
  std::vector<U64> gram;
  std::vector<I64> first, kept_first;
  std::vector<U64> kept;
  std::vector<std::uint8_t> covered;
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
        covered.assign(until - from, 0);
        for (std::size_t i = 0; i < left; ++i)
          if (repeats.later(i)) std::memset(covered.data() + (first[i] - from), 1, size);
        for (I64 i = from; i < until; ++i)
          if (covered[i - from]) *row += high[i] - low[i];
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
  const I64 *low = begin.data(), *high = end.data(), *offset = offsets.data(), texts = offsets.size() - 1;
  if (texts < 0 || begin.size() != hashes.size() || end.size() != hashes.size() || offset[texts] > hashes.size())
    throw std::invalid_argument("begin, end and hashes must have the same length, and offsets lie inside");
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

// Counts of characters of each text: ink, in words, digits, symbols (# and ...), runs of three dots, ends of sentences.
Array<I64> characters(Array<std::uint32_t> codes, Array<std::uint8_t> kinds, Array<I64> starts) {
  if (codes.size() != kinds.size()) throw std::invalid_argument("codes and kinds must have the same length");
  const std::uint32_t* code = codes.data();
  const std::uint8_t* kind = kinds.data();
  const I64 *start = starts.data(), size = codes.size(), texts = starts.size() - 1;
  Array<I64> out({py::ssize_t{6}, static_cast<py::ssize_t>(std::max<I64>(texts, 0))});
  I64* to = out.mutable_data();
  for (I64 text = 0; text < texts; ++text) {
    I64 ink = 0, word = 0, digit = 0, symbols = 0, dots = 0, ends = 0;
    const I64 stop = std::min(start[text + 1], size);
    for (I64 i = start[text]; i < stop; ++i) {
      const std::uint8_t is = kind[i];
      ink += !(is & kSpace), word += is & kWord, digit += (is & kDigit) > 0;
      if (is & kWord) continue;
      symbols += code[i] == '#' || code[i] == 0x2026;
      dots += code[i] == '.' && i + 2 < size && code[i + 1] == '.' && code[i + 2] == '.';
      ends += (is & kStop) && !(kind[std::min(i + 1, size - 1)] & kWord);
    }
    const I64 found[] = {ink, word, digit, symbols, dots, ends};
    for (int k = 0; k < 6; ++k) to[k * texts + text] = found[k];
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
  const I64 *offset = offsets.data(), sets = offsets.size() - 1, all = multipliers.size() / 2;
  if (rows < 1 || all % rows || sets < 0 || offset[sets] > values.size())
    throw std::invalid_argument("a whole number of bands, and offsets inside the values");
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

// The bytes of white space at `at` of UTF-8 text, as str.split() sees it; 0 for none.
inline int space_at(const unsigned char* at, const unsigned char* end) {
  const unsigned char c = *at;
  if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13) || (c >= 28 && c <= 31);
  if (c == 0xC2 && end - at > 1) return (at[1] == 0x85 || at[1] == 0xA0) ? 2 : 0;
  if (end - at < 3) return 0;
  if (c == 0xE1) return at[1] == 0x9A && at[2] == 0x80 ? 3 : 0;
  if (c == 0xE3) return at[1] == 0x80 && at[2] == 0x80 ? 3 : 0;
  if (c != 0xE2) return 0;
  if (at[1] == 0x81) return at[2] == 0x9F ? 3 : 0;
  const unsigned char d = at[2];
  return at[1] == 0x80 && (d <= 0x8A || d == 0xA8 || d == 0xA9 || d == 0xAF) ? 3 : 0;
}

inline bool may_be_space(unsigned char c) { return c <= ' ' || (c >= 0xC2 && c <= 0xE3 && (c == 0xC2 || c >= 0xE1)); }

// UTF-8 text with runs of white space made one blank, none at the ends.
py::bytes collapse(const std::string& text) {
  std::string out(text.size(), '\0');
  char* const begin = out.data();
  char* to = begin;
  const auto* at = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = at + text.size();
  bool blank = false;
  while (at < end) {
    const int width = may_be_space(*at) ? space_at(at, end) : 0;
    if (width) {
      blank = to != begin;
      at += width;
      continue;
    }
    if (blank) *to++ = ' ';
    blank = false;
    do *to++ = static_cast<char>(*at++); while (at < end && !may_be_space(*at));
  }
  return py::bytes(begin, to - begin);
}

// UTF-8 text as a JSON string, as json.dumps(ensure_ascii=False) writes it.
py::bytes quote(const std::string& text) {
  static const char* const kHex = "0123456789abcdef";
  std::string out;
  out.reserve(text.size() + text.size() / 16 + 2);
  out.push_back('"');
  const char* const end = text.data() + text.size();
  for (const char* at = text.data(); at < end; ++at) {
    const char* plain = at;
    while (at < end && static_cast<unsigned char>(*at) >= 0x20 && *at != '"' && *at != '\\') ++at;
    out.append(plain, at - plain);
    if (at == end) break;
    const char c = *at;
    const auto byte = static_cast<unsigned char>(c);
    out.push_back('\\');
    switch (c) {
      case '\n': out.push_back('n'); break;
      case '\r': out.push_back('r'); break;
      case '\t': out.push_back('t'); break;
      case '\f': out.push_back('f'); break;
      case '\b': out.push_back('b'); break;
      case '"': case '\\': out.push_back(c); break;
      default: out += "u00", out.push_back(kHex[byte >> 4]), out.push_back(kHex[byte & 15]);
    }
  }
  out.push_back('"');
  return py::bytes(out);
}

}  // namespace

void bind_text(py::module_& m) {
  m.def("words", &words, "(begin, end int64, hash uint64, classes of its characters uint8) of the words");
  m.def("lines", &lines, "(begin, end int64, after a blank line uint8) of the lines that are not blank");
  m.def("hashes", &hashes, "uint64 hashes of runs of characters");
  m.def("ngrams", &ngrams, "(hash uint64, first piece int64) of the n-grams inside documents");
  m.def("repetition", &repetition, "int64 [9, texts]: characters of the top 2- to 4-grams, covered by 5- to 10-grams");
  m.def("duplicates", &duplicates, "int64 [2, texts]: repeated pieces, and their characters");
  m.def("characters", &characters, "int64 [6, texts]: ink, word, digit, symbol, three dots, end of sentence");
  m.def("bands", &bands, "uint64 [sets, bands]: MinHash values mixed by band");
  m.def("quote", &quote, "UTF-8 as a JSON string");
  m.def("collapse", &collapse, "UTF-8 with runs of white space made one blank");
}
