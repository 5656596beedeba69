// The memory that the ranks of one group share, and how they wait for one another in it.
//
// It has no name in a file system (memfd): nothing is left when all ranks are killed, and the size of /dev/shm does
// not matter. Each rank holds a lock on a byte of it, which the kernel frees when the process dies.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace collectives {

using Clock = std::chrono::steady_clock;

constexpr int kMaxRanks = 64;
constexpr int kSlots = 4;                       // steps that a rank may be ahead of the slowest reader
constexpr std::size_t kSlotBytes = 256 << 10;   // of one rank in one step
constexpr std::uint32_t kRingBytes = 4 << 20;   // between two ranks, one direction; a power of two

struct PeerGone : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct TimedOut : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Aborted : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A counter that one rank raises and others wait for; the sleepers are counted so that nobody is woken in vain.
struct alignas(64) Word {
  std::atomic<std::uint32_t> value;
  std::atomic<std::uint32_t> sleepers;
};

struct Signature {  // what a rank calls; told in the first step of a call
  std::uint32_t kind, type, op, root;
  std::uint64_t bytes, steps;
};

struct alignas(64) Place {  // of one rank: steps of which its part is there, is reduced, is no longer read
  Word posted, reduced, done;
  std::atomic<std::uint32_t> left;  // it has closed the group
  Signature signature[kSlots];
};

struct alignas(64) Ring {  // bytes from one rank to another
  Word written, read;
  char data[kRingBytes];
};

struct Head {
  std::uint64_t nonce;
  std::uint32_t ranks, slot_bytes, ring_bytes;
};

// How long and in which way a wait may last.
struct Patience {
  Clock::time_point until = Clock::time_point::max();
  bool spins = false;
};

class Segment {
 public:
  // Makes the memory of `ranks`, or opens that of rank 0 at `path` (/proc/PID/fd/N).
  Segment(const std::string& path, std::uint64_t nonce, int rank, int ranks);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  Place& place(int rank) { return places_[rank]; }
  char* slot(int rank, std::uint32_t step);
  Ring& ring(int from, int to);
  void raise(Word& word, std::uint32_t value);
  // Returns when the word has come to `value`; PeerGone, TimedOut or Aborted. `what` names the call.
  void await(Word& word, std::uint32_t value, int peer, const Patience& patience, const char* what);

  const int rank, ranks;
  int fd = -1;
  std::atomic<bool> aborted{false};

 private:
  bool gone(int peer);
  char* base_ = nullptr;
  std::size_t bytes_ = 0;
  Place* places_ = nullptr;
};

}  // namespace collectives
