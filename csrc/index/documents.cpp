// Texts as Python holds them: their folded characters, lines that could hold personal data, equal forms for keys, and
// JSON. The twins: megallm/curate/text.py, pii.py, exact.py, chain.py.

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

// What `table` makes of every character, a newline after each text: (code point, class), packed as code | class << 24.
// None where a character asks for its neighbours (bit 23).
py::object fold(const py::list& texts, Array<std::uint32_t> table) {
  if (table.size() != 0x110000) throw std::invalid_argument("the table must have a row for every code point");
  const std::uint32_t *folded = table.data(), newline = folded[static_cast<int>('\n')];
  I64 size = 0;
  for (const py::handle text : texts) characters_of(text, [&](const auto*, I64 count) { size += count + 1; });
  py::array_t<std::uint32_t> codes(size);
  py::array_t<std::uint8_t> kinds(size);
  std::uint32_t *code = codes.mutable_data(), seen = 0;
  std::uint8_t* kind = kinds.mutable_data();
  for (const py::handle text : texts)
    characters_of(text, [&](const auto* character, I64 count) {
      for (I64 i = 0; i < count; ++i) {
        const std::uint32_t found = folded[character[i]];
        seen |= found;
        code[i] = found & 0x7FFFFF, kind[i] = static_cast<std::uint8_t>(found >> 24);
      }
      code += count, kind += count;
      *code++ = newline & 0x7FFFFF, *kind++ = static_cast<std::uint8_t>(newline >> 24);
    });
  if (seen >> 23 & 1) return py::none();
  return py::make_tuple(codes, kinds);
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

// UTF-8 text with runs of white space made one blank, none at the ends.
py::bytes collapse(const py::bytes& utf8) {
  const std::string_view text(utf8);
  std::uint8_t kinds[256] = {};  // 0 never white space, 1 white space, 2 may begin some
  for (unsigned c = 0; c < 0x80; ++c) kinds[c] = c == ' ' || (c >= 9 && c <= 13) || (c >= 28 && c <= 31);
  for (const unsigned c : {0xC2u, 0xE1u, 0xE2u, 0xE3u}) kinds[c] = 2;
  std::string out(text.size() + 1, '\0');
  char* const begin = out.data();
  char* to = begin;
  const auto* at = reinterpret_cast<const unsigned char*>(text.data());
  const auto* end = at + text.size();
  bool blank = true;  // the last byte written is one, or none was
  while (at < end) {
    std::uint8_t kind = kinds[*at];
    int width = 1;
    if (kind == 2) {
      width = space_at(at, end);
      kind = width > 0, width += !width;
    }
    *to = kind ? ' ' : static_cast<char>(*at);
    to += !(kind && blank);
    blank = kind;
    at += width;
  }
  return py::bytes(begin, to - begin - (blank && to != begin));
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
  m.def("fold", &fold, "(code points uint32, classes uint8) of texts, or None where a character needs its neighbours");
  m.def("digit_lines", &digit_lines, "(places int64 [lines x 3], counts int64 [lines x 4], marked uint8 [texts])");
  m.def("quote", &quote, "UTF-8 as a JSON string");
  m.def("collapse", &collapse, "UTF-8 with runs of white space made one blank");
}
