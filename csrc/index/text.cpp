// Words, lines, hashes and counts of a batch of texts. Each function gives the same integers as its numpy twin:
// megallm/curate/text.py, quality.py, stopwords.py, external.py.

#include "text.hpp"

#include <algorithm>
#include <cwchar>
#include <stdexcept>

namespace {

// The polynomial of the characters [begin, end) with rising powers of `base`, mixed.
inline U64 hash_of(const std::uint32_t* codes, I64 begin, I64 end, U64 base) {
  U64 total = 0;
  const U64 square = base * base;
  for (; end - begin >= 8; end -= 4) {  // four characters for one multiplication that waits for the one before
    const std::uint32_t* at = codes + end - 4;
    const U64 high = (at[3] + U64{1}) * base + at[2] + 1, low = (at[1] + U64{1}) * base + at[0] + 1;
    total = total * (square * square) + high * square + low;
  }
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
      const I64 next = end;
      while (i < end && code[i] == '_') ++i;  // underscores around a word are punctuation
      while (i < end && code[end - 1] == '_') --end;
      if (i < end)
        begins.push_back(i), ends.push_back(end), hashes.push_back(hash_of(code, i, end, base)), classes.push_back(is);
      i = next;
    }
  }
  return py::make_tuple(array_of(begins), array_of(ends), array_of(hashes), array_of(classes));
}

// Lines without the space around them, which of them stand after a blank line (or at the beginning of a text), and
// the newlines of each text, without the one that ends it.
py::tuple lines(Array<std::uint32_t> codes, Array<std::uint8_t> kinds, Array<I64> starts) {
  static_assert(sizeof(wchar_t) == sizeof(std::uint32_t), "wmemchr looks for newlines");
  if (codes.size() != kinds.size()) throw std::invalid_argument("codes and kinds must have the same length");
  const std::uint32_t* code = codes.data();
  const std::uint8_t* kind = kinds.data();
  const I64 *start = starts.data(), texts = texts_of(starts, codes.size());
  std::vector<I64> begins, ends;
  std::vector<std::uint8_t> after_blank;
  Array<I64> newlines(texts);
  I64* all = newlines.mutable_data();
  for (I64 text = 0; text < texts; ++text) {
    I64 since = 2;  // newlines since the last line that is not blank
    all[text] = -1;
    const I64 stop = start[text + 1];
    for (I64 at = start[text]; at < stop; ++since) {
      const auto* from = reinterpret_cast<const wchar_t*>(code + at);
      const wchar_t* found = std::wmemchr(from, L'\n', stop - at);
      all[text] += found != nullptr;
      I64 first = at, last = found ? at + (found - from) : stop;
      at = last + 1;
      while (first < last && (kind[first] & kSpace)) ++first;
      while (first < last && (kind[last - 1] & kSpace)) --last;
      if (first == last) continue;
      begins.push_back(first), ends.push_back(last), after_blank.push_back(since > 1);
      since = 0;
    }
  }
  return py::make_tuple(array_of(begins), array_of(ends), array_of(after_blank), newlines);
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

// Counts of characters of each text: ink, in words, digits, symbols (# and ...), runs of three dots, ends of sentences.
Array<I64> characters(Array<std::uint32_t> codes, Array<std::uint8_t> kinds, Array<I64> starts) {
  if (codes.size() != kinds.size()) throw std::invalid_argument("codes and kinds must have the same length");
  const std::uint32_t* code = codes.data();
  const std::uint8_t* kind = kinds.data();
  const I64 *start = starts.data(), size = codes.size(), texts = texts_of(starts, size);
  Array<I64> out({py::ssize_t{6}, static_cast<py::ssize_t>(texts)});
  I64* to = out.mutable_data();
  U64 step[256];  // what a character of a class adds to three counts of 16 bits: ink, word, digit
  for (unsigned is = 0; is < 256; ++is)
    step[is] = U64{!(is & kSpace)} | U64{(is & kWord) > 0} << 16 | U64{(is & kDigit) > 0} << 32;
  for (I64 text = 0; text < texts; ++text) {
    I64 found[6] = {};  // ink, word, digit, symbols, dots, ends
    const I64 stop = start[text + 1];
    for (I64 i = start[text]; i < stop;) {
      U64 counts = 0;
      for (const I64 end = std::min<I64>(stop, i + 0xFFFF); i < end; ++i) {
        const std::uint8_t is = kind[i];
        counts += step[is];
        if (!(is & (kStop | kSymbol)) || (is & kWord)) continue;
        found[3] += (is & kSymbol) > 0;
        found[4] += code[i] == '.' && i + 2 < size && code[i + 1] == '.' && code[i + 2] == '.';
        found[5] += (is & kStop) && !(kind[std::min(i + 1, size - 1)] & kWord);
      }
      for (int k = 0; k < 3; ++k) found[k] += counts >> 16 * k & 0xFFFF;
    }
    for (int k = 0; k < 6; ++k) to[k * texts + text] = found[k];
  }
  return out;
}

// Of each text's pieces the characters together, and those of the longest: [2, texts].
Array<I64> lengths(Array<I64> begin, Array<I64> end, Array<I64> offsets) {
  const I64 *low = begin.data(), *high = end.data(), *offset = offsets.data(), texts = texts_of(offsets, end.size());
  if (begin.size() != end.size()) throw std::invalid_argument("begin and end must have the same length");
  Array<I64> out({py::ssize_t{2}, static_cast<py::ssize_t>(texts)});
  I64* to = out.mutable_data();
  for (I64 text = 0; text < texts; ++text) {
    I64 sum = 0, longest = 0;
    for (I64 i = offset[text]; i < offset[text + 1]; ++i)
      sum += high[i] - low[i], longest = std::max(longest, high[i] - low[i]);
    to[text] = sum, to[texts + text] = longest;
  }
  return out;
}

// Of each text the lines that begin with one of `bullets`, end with an ellipsis, end with one of `terminal`, and have
// fewer than `few` characters: [4, texts].
Array<I64> line_marks(Array<std::uint32_t> codes, Array<I64> begin, Array<I64> end, Array<I64> offsets,
                      Array<std::uint32_t> bullets, Array<std::uint32_t> terminal, I64 few) {
  const std::uint32_t* code = codes.data();
  const I64 *low = begin.data(), *high = end.data(), *offset = offsets.data(), texts = texts_of(offsets, end.size());
  if (begin.size() != end.size()) throw std::invalid_argument("begin and end must have the same length");
  const auto among = [](const Array<std::uint32_t>& marks, std::uint32_t value) {
    return std::find(marks.data(), marks.data() + marks.size(), value) != marks.data() + marks.size();
  };
  Array<I64> out({py::ssize_t{4}, static_cast<py::ssize_t>(texts)});
  I64* to = out.mutable_data();
  for (I64 text = 0; text < texts; ++text) {
    I64 found[4] = {};
    for (I64 i = offset[text]; i < offset[text + 1]; ++i) {
      if (low[i] < 0 || low[i] >= high[i] || high[i] > codes.size())
        throw std::invalid_argument("a line outside the text, or an empty one");
      const std::uint32_t* last = code + high[i] - 1;
      const bool dots = high[i] - low[i] >= 3 && last[0] == '.' && last[-1] == '.' && last[-2] == '.';
      found[0] += among(bullets, code[low[i]]);
      found[1] += dots || last[0] == 0x2026;
      found[2] += among(terminal, last[0]);
      found[3] += high[i] - low[i] < few;
    }
    for (int k = 0; k < 4; ++k) to[k * texts + text] = found[k];
  }
  return out;
}

// A sorted table of hashes behind a filter over their high bits, which says no to nearly all others.
class Table {
 public:
  explicit Table(const Array<U64>& values) : begin_(values.data()), end_(begin_ + values.size()), some_(kSize / 64) {
    for (const U64* at = begin_; at < end_; ++at)
      some_[*at >> (64 - kBits + 6)] |= U64{1} << (*at >> (64 - kBits) & 63);
  }
  // Its place in the table, or -1.
  I64 place(U64 value) const {
    if (!(some_[value >> (64 - kBits + 6)] >> (value >> (64 - kBits) & 63) & 1)) return -1;
    const U64* at = std::lower_bound(begin_, end_, value);
    return at < end_ && *at == value ? at - begin_ : -1;
  }

 private:
  static constexpr int kBits = 16;
  static constexpr std::size_t kSize = std::size_t{1} << kBits;
  const U64 *begin_, *end_;
  std::vector<U64> some_;
};

py::array_t<bool> contains(Array<U64> table, Array<U64> values) {
  const Table known(table);
  py::array_t<bool> out(values.size());
  const U64* value = values.data();
  bool* to = out.mutable_data();
  for (I64 i = 0; i < values.size(); ++i) to[i] = known.place(value[i]) >= 0;
  return out;
}

// How many different words of `table` each text has that are listed for its language: bit own[text] of `languages`.
// -1 for a text without a language.
Array<I64> stop_words(Array<U64> hashes, Array<I64> offsets, Array<U64> table, Array<I64> languages, Array<I64> own) {
  const U64* hash = hashes.data();
  const I64 *offset = offsets.data(), *bits = languages.data(), *mine = own.data();
  const I64 texts = texts_of(offsets, hashes.size());
  if (own.size() != texts || languages.size() != table.size())
    throw std::invalid_argument("each text and each word of the table must have a language");
  const Table known(table);
  std::vector<I64> last(table.size(), -1);  // the text where a word was seen last
  Array<I64> out(texts);
  I64* to = out.mutable_data();
  for (I64 text = 0; text < texts; ++text) {
    to[text] = mine[text] < 0 ? -1 : 0;
    for (I64 i = offset[text]; i < offset[text + 1] && mine[text] >= 0; ++i) {
      const I64 place = known.place(hash[i]);
      if (place < 0 || last[place] == text || !(bits[place] >> mine[text] & 1)) continue;
      last[place] = text, ++to[text];
    }
  }
  return out;
}

}  // namespace

void bind_text(py::module_& m) {
  m.def("words", &words, "(begin, end int64, hash uint64, classes of its characters uint8) of the words");
  m.def("lines", &lines, "(begin, end int64, after a blank line uint8) of the lines that are not blank");
  m.def("hashes", &hashes, "uint64 hashes of runs of characters");
  m.def("characters", &characters, "int64 [6, texts]: ink, word, digit, symbol, three dots, end of sentence");
  m.def("lengths", &lengths, "int64 [2, texts]: characters of the pieces together, and of the longest");
  m.def("line_marks", &line_marks, "int64 [4, texts]: lines with a bullet, with an ellipsis, with an end, short ones");
  m.def("stop_words", &stop_words, "int64 [texts]: different listed words of the text's language");
  m.def("contains", &contains, "which values are in a sorted table, bool [values]");
}
