// Texts as Python holds them: their folded characters, forms to compare by, lines that could hold personal data,
// and JSON. The twins: megallm/curate/text.py, pii.py, chain.py.

#include "text.hpp"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>

namespace {

// Call `visit` with the characters of a Python string (of one, two or four bytes each) and their number.
template <typename Visit>
void characters_of(py::handle text, Visit&& visit) {
  PyObject* object = text.ptr();
  if (!PyUnicode_Check(object)) throw std::invalid_argument("texts must be strings");
  const void* data = PyUnicode_DATA(object);
  const I64 size = PyUnicode_GET_LENGTH(object);
  switch (PyUnicode_KIND(object)) {
    case PyUnicode_1BYTE_KIND: return visit(static_cast<const std::uint8_t*>(data), size);
    case PyUnicode_2BYTE_KIND: return visit(static_cast<const std::uint16_t*>(data), size);
    default: return visit(static_cast<const std::uint32_t*>(data), size);
  }
}

// What characters become (`folding` of megallm/curate/text.py): a row for every code point, and longer ones.
class Folding {
 public:
  static constexpr std::uint32_t kCode = 0x1FFFFF, kJamo = 1u << 22, kLonger = 1u << 23;

  Folding(const Array<std::uint32_t>& table, const Array<std::uint32_t>& longer) : table_(table), longer_(longer) {
    if (table_.size() != 0x110000) throw std::invalid_argument("the table must have a row for every code point");
    rows_ = table_.data(), more_ = longer_.data();
    for (I64 code = 0; code < table_.size(); ++code) {
      const std::uint32_t row = rows_[code];
      if (!(row & kLonger)) continue;
      const I64 at = row & kCode;
      if (at >= longer_.size() || at + 1 + I64{more_[at]} > longer_.size())
        throw std::invalid_argument("a row points outside the longer ones");
    }
  }
  std::uint32_t row(std::uint32_t code) const { return rows_[code]; }
  // How many characters a row stands for, and the first of them.
  std::uint32_t size(std::uint32_t row) const { return row & kLonger ? more_[row & kCode] : 1; }
  // The rows of what a character is folded to: mostly its own.
  template <typename Put>
  void each(std::uint32_t row, Put put) const {
    if (!(row & kLonger)) return put(row);
    const std::uint32_t* rest = more_ + (row & kCode) + 1;
    for (std::uint32_t k = 0; k < size(row); ++k) put(rest[k]);
  }

 private:
  Array<std::uint32_t> table_, longer_;
  const std::uint32_t *rows_, *more_;
};

// The folded characters of texts, a newline after each: (code points, classes, where each text begins, whether some are
// parts of syllables).
py::tuple fold(const Folding& folding, const py::list& texts) {
  std::vector<I64> starts{0};
  for (const py::handle text : texts)
    characters_of(text, [&](const auto* character, I64 count) {
      I64 size = count;
      if (!PyUnicode_IS_ASCII(text.ptr()))
        for (I64 i = 0; i < count; ++i) size += I64{folding.size(folding.row(character[i]))} - 1;
      starts.push_back(starts.back() + size + 1);
    });
  py::array_t<std::uint32_t> codes(starts.back());
  py::array_t<std::uint8_t> kinds(starts.back());
  std::uint32_t *code = codes.mutable_data(), seen = 0;
  std::uint8_t* kind = kinds.mutable_data();
  const auto put = [&](std::uint32_t row) {
    *code++ = row & Folding::kCode, *kind++ = static_cast<std::uint8_t>(row >> 24);
  };
  for (const py::handle text : texts) {
    characters_of(text, [&](const auto* character, I64 count) {
      for (I64 i = 0; i < count; ++i) {
        const std::uint32_t row = folding.row(character[i]);
        seen |= row;
        folding.each(row, put);
      }
    });
    put(folding.row('\n'));
  }
  return py::make_tuple(codes, kinds, array_of(starts), (seen & Folding::kJamo) != 0);
}

inline void append_utf8(std::string& out, std::uint32_t c) {
  const auto byte = [&](std::uint32_t value) { out.push_back(static_cast<char>(value)); };
  if (c < 0x80) return byte(c);
  if (c < 0x800) {
    byte(0xC0 | c >> 6);
  } else {
    if (c < 0x10000) byte(0xE0 | c >> 12);
    else byte(0xF0 | c >> 18), byte(0x80 | (c >> 12 & 0x3F));
    byte(0x80 | (c >> 6 & 0x3F));
  }
  byte(0x80 | (c & 0x3F));
}

// UTF-8 of a folded text with runs of white space made one blank, none at the ends, and whether it has parts of syllables.
py::tuple comparable(const Folding& folding, const py::str& text) {
  std::string out;
  std::uint32_t seen = 0;
  bool blank = false;
  const auto put = [&](std::uint32_t row) {
    if (row >> 24 & kSpace) {
      blank = !out.empty();
      return;
    }
    if (blank) out.push_back(' ');
    blank = false;
    append_utf8(out, row & Folding::kCode);
  };
  characters_of(text, [&](const auto* character, I64 count) {
    out.reserve(count + count / 8);
    for (I64 i = 0; i < count; ++i) {
      const std::uint32_t row = folding.row(character[i]);
      seen |= row;
      folding.each(row, put);
    }
  });
  return py::make_tuple(py::bytes(out), (seen & Folding::kJamo) != 0);
}

inline bool is_digit(std::uint32_t c) { return c - '0' < 10u; }
inline bool is_letter(std::uint32_t c) { return (c | 32u) - 'a' < 26u; }
inline bool is_hex(std::uint32_t c) { return is_digit(c) || (c | 32u) - 'a' < 6u; }

// Something that a text is searched for: `bounded` where no letter or digit of ASCII may stand before it.
struct Mark {
  std::string text;
  I64 pivot;  // the place of a character that text seldom has
  bool bounded;
};

// Looks for lines with three digits and what they have beside, and for marks in whole texts.
class LineScan {
 public:
  explicit LineScan(const std::vector<std::tuple<std::string, std::size_t, bool>>& marks) {
    for (const char c : std::string_view("0123456789.:-\n")) stops_[static_cast<int>(c)] = kSyntax;
    for (const auto& [text, pivot, bounded] : marks) {
      const unsigned char c = text.at(pivot);
      if (c >= 128 || is_digit(c)) throw std::invalid_argument("a mark turns on an ASCII character that is no digit");
      stops_[c] |= kPivot;
      marks_[c].push_back({text, static_cast<I64>(pivot), bounded});
    }
  }

  template <typename Char>
  void scan(const Char* text, I64 size, I64 owner) {
    marked.push_back(false);
    begin_ = 0;
    for (I64 i = 0; i < size; ++i) {
      const std::uint32_t c = text[i];
      const std::uint8_t stop = c < 128 ? stops_[c] : kOther;
      if (!stop) continue;
      if ((stop & kPivot) && !marked.back()) marked.back() = is_marked(text, size, i, marks_[c]);
      if (stop == kPivot) continue;
      if (c == '\n') {
        close(owner, i);
      } else if (stop == kOther || is_digit(c)) {
        digits_ += stop != kOther;
        ibans_ += i > 1 && is_letter(text[i - 1]) && is_letter(text[i - 2]);
      } else if (c == '.') {
        v4_ += i > 0 && i + 1 < size && is_digit(text[i - 1]) && is_digit(text[i + 1]);
      } else if (c == ':') {
        v6_ += i > 3 && is_hex(text[i - 1]) && is_hex(text[i - 2]) && is_hex(text[i - 3]) &&
               (text[i - 4] == '2' || text[i - 4] == '3');
      }
    }
    close(owner, size);
  }

  std::vector<I64> places, counts;    // (text, begin, end); (digits, v4, v6, ibans)
  std::vector<std::uint8_t> marked;   // by text

 private:
  static constexpr std::uint8_t kSyntax = 1, kPivot = 2, kOther = 4;

  void close(I64 owner, I64 end) {
    if (digits_ >= 3) {
      places.insert(places.end(), {owner, begin_, end});
      counts.insert(counts.end(), {digits_, v4_, v6_, ibans_});
    }
    begin_ = end + 1;
    digits_ = v4_ = v6_ = ibans_ = 0;
  }

  template <typename Char>
  static bool is_marked(const Char* text, I64 size, I64 at, const std::vector<Mark>& marks) {
    for (const Mark& mark : marks) {
      const I64 begin = at - mark.pivot, length = static_cast<I64>(mark.text.size());
      if (begin < 0 || begin + length > size) continue;
      if (mark.bounded && begin > 0 && (is_letter(text[begin - 1]) || is_digit(text[begin - 1]))) continue;
      I64 k = 0;
      while (k < length && text[begin + k] == static_cast<unsigned char>(mark.text[k])) ++k;
      if (k == length) return true;
    }
    return false;
  }

  std::vector<Mark> marks_[128];  // by the character that they turn on
  std::uint8_t stops_[128] = {};
  I64 begin_ = 0, digits_ = 0, v4_ = 0, v6_ = 0, ibans_ = 0;
};

py::tuple digit_lines(const py::list& texts, const std::vector<std::tuple<std::string, std::size_t, bool>>& marks) {
  LineScan found(marks);
  I64 owner = 0;
  for (const py::handle text : texts)
    characters_of(text, [&](const auto* character, I64 size) { found.scan(character, size, owner++); });
  return py::make_tuple(array_of(found.places), array_of(found.counts), array_of(found.marked));
}

// UTF-8 text as a JSON string, as json.dumps(ensure_ascii=False) writes it.
py::bytes quote(const py::bytes& utf8) {
  const std::string_view text(utf8);
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

void bind_documents(py::module_& m) {
  py::class_<Folding>(m, "Folding", "What characters become, so that what looks alike compares alike")
      .def(py::init<Array<std::uint32_t>, Array<std::uint32_t>>())
      .def("fold", &fold, "(code points uint32, classes uint8, beginnings int64, parts of syllables?) of texts")
      .def("comparable", &comparable, "(UTF-8 of a folded text with single blanks, parts of syllables?)");
  m.def("digit_lines", &digit_lines, "(places int64 [lines x 3], counts int64 [lines x 4], marked uint8 [texts])");
  m.def("quote", &quote, "UTF-8 as a JSON string");
}
