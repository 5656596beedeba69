// The language of a text by a quantised fastText model with a hierarchical softmax (Joulin et al. 2016,
// "FastText.zip"). The same rows are added in the same order in float32 as in the fastText library, so scores have the
// same bits; what a token stands for is remembered, since text repeats its words. Other models are refused:
// megallm/curate/language.py then asks the library.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace py = pybind11;

namespace {

using I32 = std::int32_t;
using U32 = std::uint32_t;
using I64 = std::int64_t;

constexpr I32 kMagic = 793712314, kVersion = 12, kHierarchical = 1, kSupervised = 3;
constexpr I32 kMaxLabels = 1 << 12, kMaxDim = 1 << 12;
constexpr I64 kMaxFloats = 1 << 24, kMaxBuckets = 1 << 24;
constexpr I64 kMaxCount = 1ll << 40;
constexpr int kCodes = 256;
constexpr std::size_t kMaxTokens = 1 << 17;  // remembered
const std::string kEnd = "</s>", kLabel = "__label__";

[[noreturn]] void refuse(const char* reason) { throw std::invalid_argument(reason); }

// The bytes of a model file, in order.
class Source {
 public:
  explicit Source(std::string_view data) : data_(data) {}
  const char* bytes(I64 size) {
    if (size < 0 || static_cast<std::size_t>(size) > data_.size() - at_) refuse("the model file is cut short");
    at_ += size;
    return data_.data() + at_ - size;
  }
  template <typename T>
  T one() {
    T value;
    std::memcpy(&value, bytes(sizeof(T)), sizeof(T));
    return value;
  }
  template <typename T>
  std::vector<T> many(I64 count) {
    if (count < 0 || count > kMaxFloats * 4) refuse("the model is too large");
    const char* from = bytes(count * static_cast<I64>(sizeof(T)));
    std::vector<T> out(count);
    if (count) std::memcpy(out.data(), from, count * sizeof(T));
    return out;
  }
  std::string word() {
    const std::size_t end = data_.find('\0', at_);
    if (end == std::string_view::npos) refuse("the model file is cut short");
    std::string out(data_.substr(at_, end - at_));
    at_ = end + 1;
    return out;
  }

 private:
  std::string_view data_;
  std::size_t at_ = 0;
};

// Rows of floats as codes of their parts (product quantisation).
struct Quantiser {
  I32 dim, parts, width, last;
  std::vector<float> centroids;

  explicit Quantiser(Source& source)
      : dim(source.one<I32>()), parts(source.one<I32>()), width(source.one<I32>()), last(source.one<I32>()) {
    if (parts < 1 || width < 1 || last < 1 || last > width || I64{parts - 1} * width + last != dim)
      refuse("the model's codes do not fit its size");
    centroids = source.many<float>(I64{dim} * kCodes);
  }
  const float* centroid(I32 part, std::uint8_t code) const {
    const I64 first = I64{part} * kCodes * width;
    return centroids.data() + first + I64{code} * (part == parts - 1 ? last : width);
  }
};

// From a token to its rows: open addressing over the bytes of all tokens laid end to end.
class Tokens {
 public:
  struct Rows {
    const I32* begin;
    U32 count;
  };
  Tokens() : slots_(4 * kMaxTokens, kNone) {}
  std::size_t size() const { return entries_.size(); }
  bool find(std::string_view token, std::uint64_t hash, Rows& found) const {
    for (std::size_t at = place(hash); slots_[at] != kNone; at = (at + 1) & (slots_.size() - 1)) {
      const Entry& entry = entries_[slots_[at]];
      if (entry.hash != hash || entry.size != token.size()) continue;
      if (std::memcmp(text_.data() + entry.text, token.data(), token.size())) continue;
      found = {rows_.data() + entry.rows, entry.count};
      return true;
    }
    return false;
  }
  void add(std::string_view token, std::uint64_t hash, const std::vector<I32>& rows) {
    std::size_t at = place(hash);
    while (slots_[at] != kNone) at = (at + 1) & (slots_.size() - 1);
    slots_[at] = static_cast<U32>(entries_.size());
    const auto size = static_cast<U32>(token.size()), count = static_cast<U32>(rows.size());
    entries_.push_back({hash, text_.size(), rows_.size(), size, count});
    text_.append(token);
    rows_.insert(rows_.end(), rows.begin(), rows.end());
  }
  // Forget all but the first `count`.
  void keep(std::size_t count) {
    if (count < entries_.size()) text_.resize(entries_[count].text), rows_.resize(entries_[count].rows);
    entries_.resize(count);
    std::fill(slots_.begin(), slots_.end(), kNone);
    for (std::size_t i = 0; i < count; ++i) {
      std::size_t at = place(entries_[i].hash);
      while (slots_[at] != kNone) at = (at + 1) & (slots_.size() - 1);
      slots_[at] = static_cast<U32>(i);
    }
  }

 private:
  struct Entry {
    std::uint64_t hash;
    std::size_t text, rows;
    U32 size, count;
  };
  static constexpr U32 kNone = 0xFFFFFFFFu;
  std::size_t place(std::uint64_t hash) const { return (hash ^ hash >> 29) & (slots_.size() - 1); }
  std::vector<U32> slots_;
  std::vector<Entry> entries_;
  std::string text_;
  std::vector<I32> rows_;
};

inline std::uint64_t hash_of(std::string_view token) {
  std::uint64_t hash = 14695981039346656037ull;
  for (const char c : token) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  return hash;
}

inline bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r') || c == '\0'; }
inline bool continues(char c) { return (c & 0xC0) == 0x80; }

class LanguageModel {
 public:
  explicit LanguageModel(const py::bytes& file) {
    Source source{std::string_view(file)};
    read_options(source);
    read_dictionary(source);
    read_rows(source);
    if (source.one<std::uint8_t>()) refuse("the output is quantised");
    const I64 rows = source.one<I64>(), columns = source.one<I64>();
    if (rows < labels_ - 1 || columns != dim_ || rows > kMaxFloats / columns) refuse("the output has another shape");
    output_ = source.many<float>(rows * columns);
    for (const std::vector<float>* floats : {&input_, &output_})
      if (!std::all_of(floats->begin(), floats->end(), [](float x) { return std::isfinite(x); })) refuse("not finite");
    plant();
    learn();
  }

  // (label, probability), or None for a text without a known token. No newline may be in the text.
  py::object predict(const std::string& text) {
    std::fill(hidden_.begin(), hidden_.end(), 0.0f);
    I64 count = 0;
    bool ended = false;
    for (std::size_t at = 0; at < text.size() && !ended;) {
      if (is_space(text[at])) { ++at; continue; }
      const std::size_t begin = at;
      while (at < text.size() && !is_space(text[at])) ++at;
      const std::string_view token = std::string_view(text).substr(begin, at - begin);
      ended = token == kEnd;
      count += add(token);
    }
    if (!ended) count += add(kEnd);
    if (!count) return py::none();
    const float scale = static_cast<float>(1.0 / static_cast<double>(count));
    for (float& value : hidden_) value *= scale;
    best_ = -1, best_score_ = 0.0f;
    descend(2 * labels_ - 2, 0.0f);
    if (best_ < 0) return py::none();
    return py::make_tuple(names_[best_], static_cast<double>(std::exp(best_score_)));
  }

 private:
  struct Node {
    I32 left = -1, right = -1;
    I64 count = 1000000000000000;
  };

  void read_options(Source& source) {
    if (source.one<I32>() != kMagic || source.one<I32>() != kVersion) refuse("not a fastText model of version 12");
    const std::vector<I32> options = source.many<I32>(12);
    source.one<double>();
    dim_ = options[0], bucket_ = options[8], shortest_ = options[9], longest_ = options[10];
    if (options[5] != 1 || options[6] != kHierarchical || options[7] != kSupervised)
      refuse("not a classifier of single words with a hierarchical softmax");
    if (dim_ < 1 || dim_ > kMaxDim || bucket_ < 1 || bucket_ > kMaxBuckets || longest_ < 1) refuse("unusual sizes");
    hidden_.resize(dim_);
  }

  void read_dictionary(Source& source) {
    const I32 size = source.one<I32>();
    words_ = source.one<I32>(), labels_ = source.one<I32>();
    source.one<I64>();
    const I64 pruned = source.one<I64>();
    if (words_ < 0 || labels_ < 1 || labels_ > kMaxLabels || pruned < 0) refuse("unusual sizes");
    if (words_ > static_cast<I32>(kMaxTokens / 2) || size != words_ + labels_) refuse("unusual sizes");
    for (I32 i = 0; i < size; ++i) {
      names_.push_back(source.word()), counts_.push_back(source.one<I64>());
      if (counts_[i] < 0 || counts_[i] > kMaxCount) refuse("a count out of range");
      if (source.one<std::int8_t>() != (i >= words_)) refuse("words and labels are mixed");
    }
    row_of_.assign(bucket_, -1);
    for (I64 i = 0; i < pruned; ++i) {
      const I32 bucket = source.one<I32>(), row = source.one<I32>();
      if (bucket < 0 || bucket >= bucket_ || row < 0 || row >= kMaxFloats) refuse("a row outside the model");
      row_of_[bucket] = words_ + row, last_row_ = std::max(last_row_, words_ + row);
    }
  }

  void read_rows(Source& source) {
    if (!source.one<std::uint8_t>()) refuse("the model is not quantised");
    const bool with_norms = source.one<std::uint8_t>();
    const I64 rows = source.one<I64>(), columns = source.one<I64>();
    if (columns != dim_ || rows <= last_row_ || rows < words_ || rows > kMaxFloats / columns) refuse("unusual sizes");
    const I32 size = source.one<I32>();
    const std::vector<std::uint8_t> codes = source.many<std::uint8_t>(size);
    const Quantiser parts(source);
    if (parts.dim != dim_ || size != rows * parts.parts) refuse("the model's codes do not fit its size");
    std::vector<float> norm(rows, 1.0f);
    if (with_norms) {
      const std::vector<std::uint8_t> norms = source.many<std::uint8_t>(rows);
      const Quantiser of_norms(source);
      for (I64 i = 0; i < rows; ++i) norm[i] = *of_norms.centroid(0, norms[i]);
    }
    input_.resize(rows * dim_);
    for (I64 row = 0; row < rows; ++row)
      for (I32 part = 0; part < parts.parts; ++part) {
        const float* from = parts.centroid(part, codes[row * parts.parts + part]);
        const I32 width = part == parts.parts - 1 ? parts.last : parts.width;
        for (I32 k = 0; k < width; ++k) input_[row * dim_ + part * parts.width + k] = norm[row] * from[k];
      }
  }

  // The Huffman tree over the labels, whose counts fall.
  void plant() {
    tree_.resize(2 * labels_ - 1);
    for (I32 i = 0; i < labels_; ++i) tree_[i].count = counts_[words_ + i];
    I32 leaf = labels_ - 1, node = labels_;
    for (I32 i = labels_; i < 2 * labels_ - 1; ++i) {
      I32 least[2];
      for (I32& one : least) one = leaf >= 0 && tree_[leaf].count < tree_[node].count ? leaf-- : node++;
      tree_[i].left = least[0], tree_[i].right = least[1];
      tree_[i].count = tree_[least[0]].count + tree_[least[1]].count;
    }
  }

  // Enter the vocabulary; labels in a text stand for nothing.
  void learn() {
    std::vector<I32> rows;
    for (I32 i = 0; i < words_ + labels_; ++i) {
      rows.clear();
      if (i < words_) rows.push_back(i);
      if (i < words_ && names_[i] != kEnd) subwords(names_[i], rows);
      tokens_.add(names_[i], hash_of(names_[i]), rows);
    }
    names_.erase(names_.begin(), names_.begin() + words_);
    vocabulary_ = tokens_.size();
  }

  // Rows of the n-grams of characters of <token>.
  void subwords(std::string_view token, std::vector<I32>& rows) {
    word_.assign(1, '<').append(token).push_back('>');
    const std::size_t size = word_.size();
    for (std::size_t i = 0; i < size; ++i) {
      if (continues(word_[i])) continue;
      U32 hash = 2166136261u;
      std::size_t j = i;
      for (I32 n = 1; j < size && n <= longest_; ++n) {
        do hash = (hash ^ static_cast<U32>(static_cast<std::int8_t>(word_[j++]))) * 16777619u;
        while (j < size && continues(word_[j]));
        if (n < shortest_ || (n == 1 && (i == 0 || j == size))) continue;
        const I32 row = row_of_[hash % static_cast<U32>(bucket_)];
        if (row >= 0) rows.push_back(row);
      }
    }
  }

  // Add a token's rows to the hidden state; how many there are.
  I64 add(std::string_view token) {
    const std::uint64_t hash = hash_of(token);
    Tokens::Rows rows{};
    if (!tokens_.find(token, hash, rows)) {
      found_.clear();
      if (token != kEnd && token.substr(0, kLabel.size()) != kLabel) subwords(token, found_);
      if (tokens_.size() >= kMaxTokens) tokens_.keep(vocabulary_);
      if (token.size() <= kMaxToken) tokens_.add(token, hash, found_);
      rows = {found_.data(), static_cast<U32>(found_.size())};
    }
    float* to = hidden_.data();
    for (U32 i = 0; i < rows.count; ++i) {
      const float* from = input_.data() + I64{rows.begin[i]} * dim_;
      for (I32 k = 0; k < dim_; ++k) to[k] += from[k];
    }
    return rows.count;
  }

  static float log_of(float x) { return static_cast<float>(std::log(x + 1e-5)); }

  void descend(I32 node, float score) {
    static const float kLeast = log_of(0.0f);
    if (score < kLeast || (best_ >= 0 && score < best_score_)) return;
    if (tree_[node].left < 0) {
      best_ = node, best_score_ = score;
      return;
    }
    const float* row = output_.data() + I64{node - labels_} * dim_;
    float dot = 0.0f;
    for (I32 k = 0; k < dim_; ++k) dot += row[k] * hidden_[k];
    const float right = static_cast<float>(1.0 / (1.0f + std::exp(-dot)));
    descend(tree_[node].left, score + log_of(static_cast<float>(1.0 - right)));
    descend(tree_[node].right, score + log_of(right));
  }

  static constexpr std::size_t kMaxToken = 64;  // bytes of a token that is remembered
  I32 dim_ = 0, bucket_ = 0, shortest_ = 0, longest_ = 0, words_ = 0, labels_ = 0, last_row_ = -1, best_ = -1;
  float best_score_ = 0.0f;
  std::vector<std::string> names_;
  std::vector<I64> counts_;
  std::vector<I32> row_of_;  // by bucket
  std::vector<float> input_, output_, hidden_;
  std::vector<Node> tree_;
  Tokens tokens_;
  std::size_t vocabulary_ = 0;
  std::string word_;
  std::vector<I32> found_;
};

}  // namespace

void bind_language(py::module_& m) {
  py::class_<LanguageModel>(m, "LanguageModel", "A fastText classifier, read from the bytes of its file")
      .def(py::init<py::bytes>())
      .def("predict", &LanguageModel::predict, "(label, probability), or None for no token at all");
}
