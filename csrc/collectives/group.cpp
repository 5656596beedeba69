#include "group.hpp"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace collectives {
namespace {

constexpr std::size_t kSmall = 16 << 10;   // bytes that every rank sums for itself, in one step
constexpr std::size_t kPiece = 128 << 10;  // of a message, after which the other end may go on
constexpr std::size_t kLarge = 16 << 20;   // results that are written past the caches
constexpr std::size_t kLine = 64;

enum Kind : std::uint32_t { kAllReduce = 1, kReduceScatter, kAllGather, kAllToAll, kBroadcast, kGather };
const char* const kNames[] = {"", "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "gather"};

std::size_t up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

// Copies out of shared memory; `past`: without reading what is overwritten, and without filling the caches.
void take(char* to, const char* from, std::size_t bytes, bool past) {
#if defined(__SSE2__)
  if (past) {
    const std::size_t head = std::min(bytes, -reinterpret_cast<std::uintptr_t>(to) % 16);
    std::memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= kLine; to += kLine, from += kLine, bytes -= kLine)
      for (std::size_t i = 0; i < kLine; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm_sfence();
  }
#endif
  std::memcpy(to, from, bytes);
}

std::string told(int rank, const Signature& call) {
  return "rank " + std::to_string(rank) + " " + (call.kind <= kGather ? kNames[call.kind] : "?") + " of " +
         std::to_string(call.bytes) + " bytes (type " + std::to_string(call.type) + ", operation " +
         std::to_string(call.op) + ", root " + std::to_string(call.root) + ")";
}

}  // namespace

Group::Group(const std::string& path, std::uint64_t nonce, int rank, int ranks, double seconds, bool spins)
    : segment_(path, nonce, rank, ranks), rank_(rank), ranks_(ranks), seconds_(seconds), spins_(spins) {
  for (int peer = 0; peer < ranks; ++peer) peers_.push_back(std::make_unique<Peer>());
}

Patience Group::patience(double seconds) const {
  const std::chrono::duration<double> limit(seconds > 0 ? seconds : seconds_);
  return {Clock::now() + std::chrono::duration_cast<Clock::duration>(limit), spins_};
}

void Group::close() {
  if (closed_) return;
  closed_ = true;
  segment_.aborted = true;
  lane_.stop();
  for (auto& peer : peers_) {
    peer->sending.stop();
    peer->receiving.stop();
  }
  segment_.place(rank_).left.store(1);
}

Group::Begun Group::start(std::function<void(const Patience&)> run, bool later) {
  if (closed_) throw Aborted("The group was destroyed.");
  auto job = std::make_shared<Job>();
  job->run = std::move(run);
  const Patience limit = patience();
  if (!later && lane_.run(job, limit)) {
    if (job->error) std::rethrow_exception(job->error);
    return nullptr;
  }
  lane_.queue(job);
  return std::make_unique<Handle>(Handle{shared_from_this(), &lane_, job});
}

// Steps

// The slot of a step may be written: nobody reads what was in it.
void Group::begin(std::uint32_t step, const Signature& mine, const Patience& patience, const char* what) {
  for (int peer = 0; peer < ranks_; ++peer)
    if (peer != rank_) segment_.await(segment_.place(peer).done, step - kSlots + 1, peer, patience, what);
  segment_.place(rank_).signature[step % kSlots] = mine;
}

void Group::post(std::uint32_t step) { segment_.raise(segment_.place(rank_).posted, step + 1); }

void Group::finish(std::uint32_t step) { segment_.raise(segment_.place(rank_).done, step + 1); }

// The part of a peer is there, and of the same call.
void Group::await_part(std::uint32_t step, int peer, const Signature& mine, bool first, const Patience& patience,
                       const char* what) {
  Place& place = segment_.place(peer);
  segment_.await(place.posted, step + 1, peer, patience, what);
  if (!first) return;
  const Signature& theirs = place.signature[step % kSlots];
  if (theirs.kind != mine.kind || theirs.type != mine.type || theirs.op != mine.op || theirs.root != mine.root ||
      theirs.bytes != mine.bytes)
    throw Mismatch("The ranks of a group called different collectives: " + told(rank_, mine) + ", " +
                   told(peer, theirs) + ".");
}

// `put(k, slot)` writes this rank's part of step k, `get(k, step)` takes the others'; put is one step ahead.
template <typename Put, typename Get>
void Group::steps(std::size_t count, const Signature& mine, const Patience& patience, const char* what, Put put,
                  Get get) {
  const std::uint32_t first = step_;
  const auto begin_step = [&](std::size_t k) {
    const std::uint32_t step = first + static_cast<std::uint32_t>(k);
    begin(step, mine, patience, what);
    put(k, segment_.slot(rank_, step));
    post(step);
  };
  begin_step(0);
  for (std::size_t k = 0; k < count; ++k) {
    if (k + 1 < count) begin_step(k + 1);
    const std::uint32_t step = first + static_cast<std::uint32_t>(k);
    get(k, step);
    finish(step);
  }
  step_ = first + static_cast<std::uint32_t>(count);
}

Group::Begun Group::all_reduce(Address data, std::size_t count, int type, int op, bool later) {
  const Sum sum{static_cast<Type>(type), static_cast<Op>(op), width(static_cast<Type>(type))};
  char* x = reinterpret_cast<char*>(data);
  return start(
      [=, this](const Patience& patience) {
        if (count * sum.width <= kSmall) {
          sum_small(x, count, sum, patience);
        } else {
          sum_large(x, count, sum, patience);
        }
      },
      later);
}

void Group::sum_small(char* data, std::size_t count, const Sum& sum, const Patience& patience) {
  const std::size_t bytes = count * sum.width;
  const Signature mine{kAllReduce, static_cast<std::uint32_t>(sum.type), static_cast<std::uint32_t>(sum.op), 0, bytes,
                       1};
  const void* in[kMaxRanks];
  steps(
      1, mine, patience, "all_reduce", [&](std::size_t, char* slot) { std::memcpy(slot, data, bytes); },
      [&](std::size_t, std::uint32_t step) {
        for (int peer = 0; peer < ranks_; ++peer) {
          if (peer != rank_) await_part(step, peer, mine, true, patience, "all_reduce");
          in[peer] = segment_.slot(peer, step);
        }
        reduce(sum.type, sum.op, in, ranks_, data, nullptr, count);
      });
}

// Each rank sums its part of the elements of a step and leaves the result in its own slot.
void Group::sum_large(char* data, std::size_t count, const Sum& sum, const Patience& patience) {
  const std::size_t room = kSlotBytes / ranks_ / kLine * kLine, unit = room / sum.width;  // of a part
  const std::size_t chunk = unit * ranks_;
  const Signature mine{kAllReduce, static_cast<std::uint32_t>(sum.type), static_cast<std::uint32_t>(sum.op), 0,
                       count * sum.width, 0};
  const bool past = count * sum.width >= kLarge;
  // Elements of a part: where it begins, and how many there are.
  const auto part = [&](std::size_t k, int owner) {
    const std::size_t from = k * chunk, n = std::min(chunk, count - from);
    const std::size_t share = up((n + ranks_ - 1) / ranks_, kLine / sum.width);
    const std::size_t begin = std::min(n, share * owner), end = std::min(n, share * (owner + 1));
    return std::pair{from + begin, end - begin};
  };
  const void* in[kMaxRanks];
  steps(
      (count + chunk - 1) / chunk, mine, patience, "all_reduce",
      [&](std::size_t k, char* slot) {
        for (int owner = 0; owner < ranks_; ++owner) {
          const auto [at, n] = part(k, owner);
          if (owner != rank_) std::memcpy(slot + owner * room, data + at * sum.width, n * sum.width);
        }
      },
      [&](std::size_t k, std::uint32_t step) {
        const auto [at, n] = part(k, rank_);
        for (int peer = 0; peer < ranks_; ++peer) {
          if (peer != rank_) await_part(step, peer, mine, k == 0, patience, "all_reduce");
          in[peer] = peer == rank_ ? data + at * sum.width : segment_.slot(peer, step) + rank_ * room;
        }
        reduce(sum.type, sum.op, in, ranks_, data + at * sum.width, segment_.slot(rank_, step) + rank_ * room, n);
        segment_.raise(segment_.place(rank_).reduced, step + 1);
        for (int next = 1; next < ranks_; ++next) {
          const int owner = (rank_ + next) % ranks_;
          const auto [from, elements] = part(k, owner);
          segment_.await(segment_.place(owner).reduced, step + 1, owner, patience, "all_reduce");
          take(data + from * sum.width, segment_.slot(owner, step) + owner * room, elements * sum.width, past);
        }
      });
}

Group::Begun Group::reduce_scatter(Address in, Address out, std::size_t count, int type, int op, bool later) {
  const Sum sum{static_cast<Type>(type), static_cast<Op>(op), width(static_cast<Type>(type))};
  return start(
      [=, this](const Patience& patience) {
        scatter_sums(reinterpret_cast<const char*>(in), reinterpret_cast<char*>(out), count, sum, patience);
      },
      later);
}

void Group::scatter_sums(const char* in, char* out, std::size_t count, const Sum& sum, const Patience& patience) {
  const std::size_t room = kSlotBytes / ranks_ / kLine * kLine, unit = room / sum.width, whole = count * sum.width;
  const Signature mine{kReduceScatter, static_cast<std::uint32_t>(sum.type), static_cast<std::uint32_t>(sum.op), 0,
                       whole, 0};
  const void* parts[kMaxRanks];
  steps(
      std::max<std::size_t>(1, (count + unit - 1) / unit), mine, patience, "reduce_scatter",
      [&](std::size_t k, char* slot) {
        const std::size_t n = std::min(unit, count - k * unit) * sum.width;
        for (int owner = 0; owner < ranks_; ++owner)
          if (owner != rank_) std::memcpy(slot + owner * room, in + owner * whole + k * unit * sum.width, n);
      },
      [&](std::size_t k, std::uint32_t step) {
        const std::size_t at = k * unit * sum.width;
        for (int peer = 0; peer < ranks_; ++peer) {
          if (peer != rank_) await_part(step, peer, mine, k == 0, patience, "reduce_scatter");
          parts[peer] = peer == rank_ ? in + rank_ * whole + at : segment_.slot(peer, step) + rank_ * room;
        }
        reduce(sum.type, sum.op, parts, ranks_, out + at, nullptr, std::min(unit, count - k * unit));
      });
}

Group::Begun Group::all_gather(Address in, Address out, std::size_t bytes, bool later) {
  std::vector<Address> outs;
  for (int rank = 0; rank < ranks_; ++rank) outs.push_back(out + rank * bytes);
  const Signature mine{kAllGather, 0, 0, 0, bytes, 0};
  const char* from = reinterpret_cast<const char*>(in);
  return start(
      [=, this](const Patience& patience) {
        char* own = reinterpret_cast<char*>(outs[rank_]);
        steps(
            std::max<std::size_t>(1, (bytes + kSlotBytes - 1) / kSlotBytes), mine, patience, "all_gather",
            [&](std::size_t k, char* slot) {
              const std::size_t at = k * kSlotBytes, n = std::min(kSlotBytes, bytes - at);
              std::memcpy(slot, from + at, n);
              if (own != from) take(own + at, from + at, n, bytes * ranks_ >= kLarge);
            },
            [&](std::size_t k, std::uint32_t step) {
              const std::size_t at = k * kSlotBytes, n = std::min(kSlotBytes, bytes - at);
              for (int next = 1; next < ranks_; ++next) {
                const int peer = (rank_ + next) % ranks_;
                await_part(step, peer, mine, k == 0, patience, "all_gather");
                take(reinterpret_cast<char*>(outs[peer]) + at, segment_.slot(peer, step), n, bytes * ranks_ >= kLarge);
              }
            });
      },
      later);
}

Group::Begun Group::all_to_all(Address in, Address out, std::vector<std::size_t> sent,
                               std::vector<std::size_t> received, bool later) {
  return start(
      [=, this](const Patience& patience) {
        exchange(reinterpret_cast<const char*>(in), reinterpret_cast<char*>(out), sent, received, patience);
      },
      later);
}

// Runs of bytes of different length: the longest of any rank, told in the first step, says how many steps there are.
void Group::exchange(const char* in, char* out, const std::vector<std::size_t>& sent,
                     const std::vector<std::size_t>& received, const Patience& patience) {
  const std::size_t room = kSlotBytes / ranks_ / kLine * kLine;
  std::vector<std::size_t> from(ranks_ + 1, 0), to(ranks_ + 1, 0);
  std::size_t longest = 0;
  for (int peer = 0; peer < ranks_; ++peer) {
    from[peer + 1] = from[peer] + sent[peer];
    to[peer + 1] = to[peer] + received[peer];
    if (peer != rank_) longest = std::max(longest, sent[peer]);
  }
  if (sent[rank_] != received[rank_]) throw Mismatch("all_to_all: what a rank sends itself has two sizes.");
  const Signature mine{kAllToAll, 0, 0, 0, 0, std::max<std::size_t>(1, (longest + room - 1) / room)};
  std::uint64_t most = 1;
  const bool past = to[ranks_] >= kLarge;
  const auto share = [&](std::size_t k, std::size_t bytes) { return bytes > k * room ? std::min(room, bytes - k * room) : 0; };
  const auto put = [&](std::size_t k, char* slot) {
    for (int peer = 0; peer < ranks_; ++peer)
      if (peer != rank_) {
        const std::size_t n = share(k, sent[peer]);
        if (n) std::memcpy(slot + peer * room, in + from[peer] + k * room, n);
      }
  };
  const auto get = [&](std::size_t k, std::uint32_t step) {
    for (int next = 1; next < ranks_; ++next) {
      const int peer = (rank_ + next) % ranks_;
      await_part(step, peer, mine, k == 0, patience, "all_to_all");
      if (k == 0) most = std::max(most, segment_.place(peer).signature[step % kSlots].steps);
      const std::size_t n = share(k, received[peer]);
      if (n) take(out + to[peer] + k * room, segment_.slot(peer, step) + rank_ * room, n, past);
    }
  };
  take(out + to[rank_], in + from[rank_], sent[rank_], past);
  steps(1, mine, patience, "all_to_all", put, get);
  most = std::max(most, mine.steps);
  if (most == 1) return;
  const auto after = [](auto f) { return [f](std::size_t k, auto last) { f(k + 1, last); }; };
  steps(most - 1, mine, patience, "all_to_all", after(std::ref(put)), after(std::ref(get)));
}

Group::Begun Group::broadcast(Address data, std::size_t bytes, int root, bool later) {
  char* x = reinterpret_cast<char*>(data);
  const Signature mine{kBroadcast, 0, 0, static_cast<std::uint32_t>(root), bytes, 0};
  return start(
      [=, this](const Patience& patience) {
        steps(
            std::max<std::size_t>(1, (bytes + kSlotBytes - 1) / kSlotBytes), mine, patience, "broadcast",
            [&](std::size_t k, char* slot) {
              const std::size_t at = k * kSlotBytes;
              if (rank_ == root) std::memcpy(slot, x + at, std::min(kSlotBytes, bytes - at));
            },
            [&](std::size_t k, std::uint32_t step) {
              const std::size_t at = k * kSlotBytes;
              if (rank_ == root) return;
              await_part(step, root, mine, k == 0, patience, "broadcast");
              take(x + at, segment_.slot(root, step), std::min(kSlotBytes, bytes - at), bytes >= kLarge);
            });
      },
      later);
}

Group::Begun Group::gather(Address in, std::vector<Address> outs, std::size_t bytes, int root, bool later) {
  const char* from = reinterpret_cast<const char*>(in);
  const Signature mine{kGather, 0, 0, static_cast<std::uint32_t>(root), bytes, 0};
  return start(
      [=, this](const Patience& patience) {
        if (rank_ == root) std::memcpy(reinterpret_cast<char*>(outs[rank_]), from, bytes);
        steps(
            std::max<std::size_t>(1, (bytes + kSlotBytes - 1) / kSlotBytes), mine, patience, "gather",
            [&](std::size_t k, char* slot) {
              const std::size_t at = k * kSlotBytes;
              if (rank_ != root) std::memcpy(slot, from + at, std::min(kSlotBytes, bytes - at));
            },
            [&](std::size_t k, std::uint32_t step) {
              const std::size_t at = k * kSlotBytes;
              for (int peer = 0; rank_ == root && peer < ranks_; ++peer) {
                if (peer == root) continue;
                await_part(step, peer, mine, k == 0, patience, "gather");
                std::memcpy(reinterpret_cast<char*>(outs[peer]) + at, segment_.slot(peer, step),
                            std::min(kSlotBytes, bytes - at));
              }
            });
      },
      later);
}

// Messages

void Group::write(int peer, const char* from, std::size_t bytes, const Patience& patience) {
  Ring& ring = segment_.ring(rank_, peer);
  while (bytes) {
    const std::uint32_t written = ring.written.value.load(std::memory_order_relaxed), at = written % kRingBytes;
    const std::size_t n = std::min({bytes, kPiece, static_cast<std::size_t>(kRingBytes - at)});
    segment_.await(ring.read, written + static_cast<std::uint32_t>(n) - kRingBytes, peer, patience, "send");
    std::memcpy(ring.data + at, from, n);
    segment_.raise(ring.written, written + static_cast<std::uint32_t>(n));
    from += n, bytes -= n;
  }
}

void Group::read(int peer, char* to, std::size_t bytes, const Patience& patience) {
  Ring& ring = segment_.ring(peer, rank_);
  const bool past = bytes >= kLarge;
  while (bytes) {
    const std::uint32_t read = ring.read.value.load(std::memory_order_relaxed), at = read % kRingBytes;
    segment_.await(ring.written, read + 1, peer, patience, "recv");
    const std::uint32_t there = ring.written.value.load(std::memory_order_acquire) - read;
    const std::size_t n = std::min({bytes, kPiece, static_cast<std::size_t>(kRingBytes - at), std::size_t(there)});
    take(to, ring.data + at, n, past);
    segment_.raise(ring.read, read + static_cast<std::uint32_t>(n));
    to += n, bytes -= n;
  }
}

void Group::send_message(int peer, const Job& job, const Patience& patience) {
  const Message message{job.bytes, job.tag};
  write(peer, reinterpret_cast<const char*>(&message), sizeof message, patience);
  write(peer, job.to, job.bytes, patience);
}

// Reads messages until the one that the job asks for; others go to the receives that ask for them, or are kept.
void Group::receive_message(int peer, Job& job, const Patience& patience) {
  auto& kept = peers_[peer]->unexpected[job.tag];
  const auto check = [peer](const Job& to, std::uint64_t bytes) {
    if (to.bytes != bytes)
      throw Mismatch("recv: rank " + std::to_string(peer) + " sent " + std::to_string(bytes) + " bytes, " +
                     std::to_string(to.bytes) + " are received.");
  };
  if (!kept.empty()) {
    check(job, kept.front().size());
    std::memcpy(job.to, kept.front().data(), job.bytes);
    kept.erase(kept.begin());
    return;
  }
  Lane& lane = peers_[peer]->receiving;
  while (true) {
    Message message;
    read(peer, reinterpret_cast<char*>(&message), sizeof message, patience);
    if (message.tag == job.tag) {
      check(job, message.bytes);
      return read(peer, job.to, job.bytes, patience);
    }
    if (auto other = lane.take([&](const Job& each) { return each.tag == message.tag; })) {
      check(*other, message.bytes);
      read(peer, other->to, message.bytes, patience);
      lane.finish(*other);
    } else {
      std::vector<char> bytes(message.bytes);
      read(peer, bytes.data(), bytes.size(), patience);
      peers_[peer]->unexpected[message.tag].push_back(std::move(bytes));
    }
  }
}

// Whether the next message is the one asked for, and all of it has come.
bool Group::is_there(int peer, const Job& job) {
  if (!peers_[peer]->receiving.idle()) return false;
  Ring& ring = segment_.ring(peer, rank_);
  const std::uint32_t read = ring.read.value.load(std::memory_order_relaxed);
  const std::uint32_t there = ring.written.value.load(std::memory_order_acquire) - read;
  if (there < sizeof(Message) + job.bytes || !peers_[peer]->unexpected[job.tag].empty()) return false;
  Message message;
  for (std::size_t i = 0; i < sizeof message; ++i)
    reinterpret_cast<char*>(&message)[i] = ring.data[(read + i) % kRingBytes];
  return message.tag == job.tag && message.bytes == job.bytes;
}

Group::Begun Group::send(Address data, std::size_t bytes, int peer, std::uint32_t tag) {
  if (closed_) throw Aborted("The group was destroyed.");
  auto job = std::make_shared<Job>();
  job->to = reinterpret_cast<char*>(data), job->bytes = bytes, job->tag = tag;
  job->run = [this, peer, raw = job.get()](const Patience& patience) { send_message(peer, *raw, patience); };
  Lane& lane = peers_[peer]->sending;
  Ring& ring = segment_.ring(rank_, peer);
  const std::uint32_t used = ring.written.value.load() - ring.read.value.load();
  if (bytes + sizeof(Message) <= kRingBytes - used && lane.run(job, patience())) {  // it leaves without a wait
    if (job->error) std::rethrow_exception(job->error);
    return nullptr;
  }
  lane.queue(job);
  return std::make_unique<Handle>(Handle{shared_from_this(), &lane, job});
}

Group::Begun Group::receive(Address data, std::size_t bytes, int peer, std::uint32_t tag) {
  if (closed_) throw Aborted("The group was destroyed.");
  auto job = std::make_shared<Job>();
  job->to = reinterpret_cast<char*>(data), job->bytes = bytes, job->tag = tag;
  job->run = [this, peer, raw = job.get()](const Patience& patience) { receive_message(peer, *raw, patience); };
  Lane& lane = peers_[peer]->receiving;
  if (is_there(peer, *job) && lane.run(job, patience())) {
    if (job->error) std::rethrow_exception(job->error);
    return nullptr;
  }
  lane.queue(job);
  return std::make_unique<Handle>(Handle{shared_from_this(), &lane, job});
}

}  // namespace collectives
