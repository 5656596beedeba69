#include "segment.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>

namespace collectives {
namespace {

constexpr auto kLook = std::chrono::milliseconds(50);  // how often a waiting rank looks whether its peer lives
constexpr auto kSpin = std::chrono::microseconds(100);
constexpr std::size_t kPage = 4096;

std::size_t pages(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

std::size_t places_at() { return pages(sizeof(Head)); }
std::size_t slots_at(int ranks) { return places_at() + pages(ranks * sizeof(Place)); }
std::size_t rings_at(int ranks) { return slots_at(ranks) + ranks * kSlots * kSlotBytes; }
std::size_t size_of(int ranks) { return rings_at(ranks) + pages(sizeof(Ring)) * ranks * ranks; }

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_on(std::atomic<std::uint32_t>& word, std::uint32_t seen) {
  const timespec limit{0, std::chrono::nanoseconds(kLook).count()};
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT, seen, &limit, nullptr, 0);
}

[[noreturn]] void fail(const char* what) { throw std::runtime_error(std::string(what) + ": " + std::strerror(errno)); }

}  // namespace

Segment::Segment(const std::string& path, std::uint64_t nonce, int rank, int ranks)
    : rank(rank), ranks(ranks), bytes_(size_of(ranks)) {
  static_assert(std::atomic<std::uint32_t>::is_always_lock_free && sizeof(std::atomic<std::uint32_t>) == 4);
  if (path.empty()) {
    fd = memfd_create("megallm-group", MFD_CLOEXEC);
    if (fd < 0) fail("memfd_create");
    if (ftruncate(fd, static_cast<off_t>(bytes_))) fail("ftruncate");
  } else {
    fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) fail("open");
    struct stat found;
    if (fstat(fd, &found) || static_cast<std::size_t>(found.st_size) != bytes_)
      throw std::runtime_error("the shared memory has another size");
  }
  void* mapped = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) fail("mmap");
  base_ = static_cast<char*>(mapped);
  Head* head = reinterpret_cast<Head*>(base_);
  const Head mine{nonce, static_cast<std::uint32_t>(ranks), kSlotBytes, kRingBytes};
  if (path.empty()) {
    *head = mine;
  } else if (std::memcmp(head, &mine, sizeof mine)) {
    throw std::runtime_error("the shared memory is of another group or build");
  }
  places_ = reinterpret_cast<Place*>(base_ + places_at());
  struct flock lock {};
  lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = rank, lock.l_len = 1;
  if (fcntl(fd, F_SETLK, &lock)) fail("fcntl");
}

Segment::~Segment() {
  if (base_) munmap(base_, bytes_);
  if (fd >= 0) close(fd);
}

char* Segment::slot(int of, std::uint32_t step) {
  return base_ + slots_at(ranks) + (static_cast<std::size_t>(of) * kSlots + step % kSlots) * kSlotBytes;
}

Ring& Segment::ring(int from, int to) {
  const std::size_t number = static_cast<std::size_t>(from) * ranks + to;
  return *reinterpret_cast<Ring*>(base_ + rings_at(ranks) + number * pages(sizeof(Ring)));
}

bool Segment::gone(int peer) {
  struct flock lock {};
  lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = peer, lock.l_len = 1;
  return place(peer).left.load() || (fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK);
}

void Segment::raise(Word& word, std::uint32_t value) {
  word.value.store(value, std::memory_order_seq_cst);
  if (word.sleepers.load(std::memory_order_seq_cst))
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word.value), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

void Segment::await(Word& word, std::uint32_t value, int peer, const Patience& patience, const char* what) {
  const auto there = [&] {  // counters wrap around
    return static_cast<std::int32_t>(word.value.load(std::memory_order_acquire) - value) >= 0;
  };
  if (there()) return;
  auto now = Clock::now();
  if (patience.spins) {
    for (const auto end = now + kSpin; now < end; now = Clock::now())
      for (int i = 0; i < 32; ++i) {
        if (there()) return;
        pause();
      }
  }
  auto look = now + kLook;
  while (true) {
    word.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const std::uint32_t seen = word.value.load(std::memory_order_seq_cst);
    if (static_cast<std::int32_t>(seen - value) < 0) sleep_on(word.value, seen);
    word.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    if (there()) return;
    now = Clock::now();
    if (now < look) continue;
    look = now + kLook;
    const std::string where = "rank " + std::to_string(peer) + " of " + std::to_string(ranks) + " in " + what;
    if (aborted) throw Aborted(std::string("The group was destroyed during ") + what + ".");
    if (gone(peer) && !there()) throw PeerGone("Connection closed by peer: " + where + " over shared memory.");
    if (now >= patience.until && !there()) throw TimedOut("Timed out waiting for " + where + " over shared memory.");
  }
}

}  // namespace collectives
