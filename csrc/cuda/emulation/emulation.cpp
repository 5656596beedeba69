// Runs kernels on a CPU and judges what they do. One block after another, its threads as fibers; a launch runs in
// three orders of blocks and threads, which must leave the same bits. Found on the way, with file and line: an address
// outside the buffers of the operation and outside shared memory, a write to an input, a read of what nothing wrote,
// two threads that touch a byte without a barrier between (one of them writing, not both atomically), blocks that
// touch each other's bytes, barriers and shuffles that not all threads reach, an address that is not aligned.
//
// Kernels are compiled with -fsanitize=thread: the compiler then calls __tsan_read4(address) and its like before each
// access to memory. Those are answered here; the sanitizer's own library is not linked.

#include "cuda.hpp"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <sstream>
#include <vector>

namespace emulation {

Builtins builtins;

namespace {

using I64 = std::int64_t;

constexpr I64 kStack = 64 << 10, kMaxThreads = 1024, kLanes = 32;
constexpr I64 kArena = 227 << 10, kStatic = 48 << 10, kGap = 32;  // a Hopper block's shared memory; what it may declare
enum class State { ready, at_block, at_warp, done };

// Who touched a byte: a thread of a block of a launch, between which barriers.
struct Touch {
  int launch = 0, block = 0;
  short thread = -1;
  unsigned short block_epoch = 0, warp_epoch = 0;
  bool atomic = false;
  void* from = nullptr;
};

struct Byte {
  Touch written, read, read_before;  // of the readers the last, and the last one of another thread
  bool known = false;                // it has a value
};

struct Buffer {
  const unsigned char* data;
  I64 bytes;
  Use use;
  std::vector<Byte> shadow;
};

struct Fiber {
  ucontext_t context;
  State state;
  unsigned short block_epoch, warp_epoch;
  const char* file;
  int line;
};

// One exchange of a warp: lanes arrive, and leave when all of the mask are there.
struct Exchange {
  unsigned mask = 0, arrived = 0, left = 0;
  const char* file = nullptr;
  int line = 0;
  std::uint64_t values[kLanes];
};

struct Site {
  const char* file;
  int line;
  I64 offset, bytes;
};

struct Machine {
  std::vector<Buffer> buffers;
  std::string operation;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  std::vector<std::vector<Exchange>> warps;
  unsigned char* stacks = nullptr;
  alignas(16) unsigned char arena[kArena];
  std::vector<Byte> arena_shadow = std::vector<Byte>(kArena);
  std::vector<Site> sites;
  I64 arena_used = 0, dynamic_bytes = 0;
  ucontext_t scheduler;
  const unsigned char* closure = nullptr;
  I64 closure_bytes = 0;
  int launch = 0, block = 0;
  void (*body)(const void*) = nullptr;
  const char* kernel = "";
  std::vector<dim3> thread_ids;
  int current = -1, num_threads = 0;
  std::string failure;
  size_t last_buffer = 0;
};

Machine& m() {
  static Machine machine;
  return machine;
}

Fiber& self() { return m().fibers[m().current]; }

std::string at(const char* file, int line) {
  std::ostringstream text;
  text << file << ":" << line;
  return text.str();
}

// Files and lines of a return address, the innermost function first.
std::string place(void* address) {
  if (address == nullptr) return "an earlier instruction";
  Dl_info found;
  if (!dladdr(address, &found)) return "an unknown place";
  std::ostringstream command;
  command << "addr2line -i -e '" << found.dli_fname << "' 0x" << std::hex
          << static_cast<char*>(address) - static_cast<char*>(found.dli_fbase) - 1 << " 2>/dev/null";
  std::string text;
  char line[512];
  if (FILE* pipe = popen(command.str().c_str(), "r")) {
    while (fgets(line, sizeof line, pipe)) {
      std::string one(line);
      one.erase(one.find_last_not_of("\n") + 1);
      const size_t slash = one.rfind('/'), note = one.find(" (");
      one = one.substr(slash == std::string::npos ? 0 : slash + 1, note == std::string::npos ? note : note - slash - 1);
      if (one.compare(0, 9, "cuda.hpp:") != 0) text += (text.empty() ? "" : " in ") + one;
    }
    pclose(pipe);
  }
  return text.empty() ? "an unknown place" : text;
}

std::string thread_name(I64 block, int thread) {
  std::ostringstream text;
  text << "thread " << thread << " of block " << block;
  return text.str();
}

[[noreturn]] void fail(const std::string& what) {
  Machine& all = m();
  if (all.failure.empty())
    all.failure = all.operation + ", kernel " + all.kernel + ", " + thread_name(all.block, all.current) + ": " + what;
  swapcontext(&self().context, &all.scheduler);
  std::abort();  // a thread that failed is never resumed
}

void wait(State state, const char* file, int line) {
  Fiber& fiber = self();
  fiber.state = state, fiber.file = file, fiber.line = line;
  swapcontext(&fiber.context, &m().scheduler);
}

// Whether an earlier touch of a byte happened before what the current thread does now.
bool ordered(const Touch& earlier, bool atomic) {
  const Machine& all = m();
  if (earlier.thread < 0 || earlier.launch != all.launch) return true;
  if (earlier.atomic && atomic) return true;
  if (earlier.block != all.block) return false;
  if (earlier.thread == all.current || earlier.block_epoch != self().block_epoch) return true;
  return earlier.thread / kLanes == all.current / kLanes && earlier.warp_epoch != self().warp_epoch;
}

void touch(Byte& byte, bool write, bool atomic, void* from, const char* memory) {
  const Machine& all = m();
  const Touch* other = ordered(byte.written, atomic) ? nullptr : &byte.written;
  if (write && !other && !ordered(byte.read, atomic)) other = &byte.read;
  if (write && !other && !ordered(byte.read_before, atomic)) other = &byte.read_before;
  if (other)
    fail(std::string("race in ") + memory + " memory: it " + (write ? "writes" : "reads") + " at " + place(from) + " what " +
         thread_name(other->block, other->thread) + (other == &byte.written ? " wrote" : " read") + " at " +
         place(other->from) + " without a barrier between");
  const Fiber& me = self();
  const Touch now{all.launch, all.block, static_cast<short>(all.current), me.block_epoch, me.warp_epoch, atomic, from};
  if (write) {
    byte.written = now, byte.known = true;
  } else {
    if (!byte.known) fail(std::string("it reads ") + memory + " memory that nothing wrote, at " + place(from));
    if (byte.read.thread != now.thread || byte.read.block != now.block) byte.read_before = byte.read;
    byte.read = now;
  }
}

bool inside(const void* address, const void* begin, I64 bytes) {
  const auto offset = static_cast<const unsigned char*>(address) - static_cast<const unsigned char*>(begin);
  return offset >= 0 && offset < bytes;
}

Buffer* buffer_of(const unsigned char* address) {
  Machine& all = m();
  if (all.last_buffer < all.buffers.size() && inside(address, all.buffers[all.last_buffer].data, all.buffers[all.last_buffer].bytes))
    return &all.buffers[all.last_buffer];
  for (Buffer& one : all.buffers)
    if (inside(address, one.data, one.bytes)) {
      all.last_buffer = &one - all.buffers.data();
      return &one;
    }
  return nullptr;
}

void shared_access(const unsigned char* address, I64 size, bool write, bool atomic, void* from) {
  Machine& all = m();
  const I64 offset = address - all.arena;
  const auto holds = [&](I64 begin, I64 bytes) { return offset >= begin && offset + size <= begin + bytes; };
  bool found = holds(0, all.dynamic_bytes);
  for (const Site& site : all.sites) found = found || holds(site.offset, site.bytes);
  if (!found) fail("an address outside every array in shared memory, at " + place(from));
  for (I64 i = 0; i < size; ++i) touch(all.arena_shadow[offset + i], write, atomic, from, "shared");
}

void access(void* pointer, I64 size, bool write, void* from, bool atomic = false) {
  Machine& all = m();
  if (all.current < 0) return;
  const auto* address = static_cast<const unsigned char*>(pointer);
  if (inside(address, all.stacks, kStack * kMaxThreads) || inside(address, &builtins, sizeof builtins)) return;
  if (!write && inside(address, all.closure, all.closure_bytes)) return;  // the arguments of the launch
  if (inside(address, all.arena, kArena)) return shared_access(address, size, write, atomic, from);
  Buffer* buffer = buffer_of(address);
  const char* doing = write ? "it writes" : "it reads";
  if (buffer == nullptr) fail(std::string(doing) + " outside every buffer of the operation, at " + place(from));
  const I64 offset = address - buffer->data;
  if (offset + size > buffer->bytes)
    fail(std::string(doing) + " past the end of a buffer of " + std::to_string(buffer->bytes) + " bytes, at " + place(from));
  if (write && buffer->use == Use::in) fail("it writes to an input, at " + place(from));
  for (I64 i = 0; i < size; ++i) touch(buffer->shadow[offset + i], write, atomic, from, "global");
}

void entry() {
  m().body(m().closure);
  self().state = State::done;
  swapcontext(&self().context, &m().scheduler);
}

void resume(int thread) {
  Machine& all = m();
  all.current = thread;
  builtins.thread = all.thread_ids[thread];
  swapcontext(&all.scheduler, &all.fibers[thread].context);
  all.current = -1;
}

// Whether all threads that are left wait at the block's barrier; then they go on.
bool release_block() {
  Machine& all = m();
  const Fiber* first = nullptr;
  for (int i = 0; i < all.num_threads; ++i) {
    Fiber& one = all.fibers[i];
    if (one.state == State::done) continue;
    if (one.state != State::at_block) return false;
    if (first == nullptr) first = &one;
    if (first->line != one.line || std::strcmp(first->file, one.file) != 0) {
      all.failure = all.operation + ", kernel " + all.kernel + ": threads of a block wait at two barriers, " +
                    at(first->file, first->line) + " and " + at(one.file, one.line);
      return false;
    }
  }
  if (first == nullptr) return false;
  for (int i = 0; i < all.num_threads; ++i)
    if (all.fibers[i].state == State::at_block) all.fibers[i].state = State::ready, ++all.fibers[i].block_epoch;
  return true;
}

std::string waiting() {
  std::ostringstream text;
  const Machine& all = m();
  text << all.operation << ", kernel " << all.kernel << ", block " << all.block << ": no thread can go on;";
  for (int i = 0, told = 0; i < all.num_threads && told < 3; ++i) {
    const Fiber& one = all.fibers[i];
    if (one.state == State::done) continue;
    text << " thread " << i << " waits at " << at(one.file, one.line) << ";", ++told;
  }
  const auto done = std::count_if(all.fibers.begin(), all.fibers.begin() + all.num_threads,
                                  [](const Fiber& one) { return one.state == State::done; });
  text << " " << done << " have ended";
  return text.str();
}

void start_block() {
  Machine& all = m();
  all.sites.clear();
  const I64 used = std::max(all.arena_used, all.dynamic_bytes);
  std::fill(all.arena_shadow.begin(), all.arena_shadow.begin() + used, Byte{});
  std::memset(all.arena, 0xff, used);  // not a number, and no index
  all.arena_used = (all.dynamic_bytes + kGap + 15) / 16 * 16;
  all.warps.assign((all.num_threads + kLanes - 1) / kLanes, {});
  for (int i = 0; i < all.num_threads; ++i) {
    Fiber& one = all.fibers[i];
    one.state = State::ready, one.block_epoch = one.warp_epoch = 0;
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = all.stacks + i * kStack;
    one.context.uc_stack.ss_size = kStack;
    one.context.uc_link = nullptr;
    makecontext(&one.context, entry, 0);
  }
}

void run_block(const std::vector<int>& order) {
  Machine& all = m();
  start_block();
  for (bool going = true; going && all.failure.empty();) {
    going = false;
    for (int thread : order) {
      if (all.fibers[thread].state != State::ready) continue;
      going = true;
      resume(thread);
      if (!all.failure.empty()) return;
    }
    going = going || release_block();
  }
  const auto left = std::any_of(all.fibers.begin(), all.fibers.begin() + all.num_threads,
                                [](const Fiber& one) { return one.state != State::done; });
  if (left && all.failure.empty()) all.failure = waiting();
}

std::vector<int> ordering(int count, int kind) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (kind == 1) std::reverse(order.begin(), order.end());
  if (kind == 2) std::shuffle(order.begin(), order.end(), std::mt19937(12345));
  return order;
}

using Contents = std::vector<std::vector<unsigned char>>;

Contents contents() {
  Contents all;
  for (const Buffer& one : m().buffers) all.emplace_back(one.data, one.use == Use::in ? one.data : one.data + one.bytes);
  return all;
}

void restore(const Contents& kept) {
  for (size_t i = 0; i < kept.size(); ++i)
    if (!kept[i].empty()) std::memcpy(const_cast<unsigned char*>(m().buffers[i].data), kept[i].data(), kept[i].size());
}

[[noreturn]] void raise() {
  const std::string failure = m().failure;
  abandon();
  throw std::runtime_error(failure);
}

void run_grid(dim3 grid, dim3 block, int kind) {
  Machine& all = m();
  ++all.launch;
  for (int number : ordering(grid.x * grid.y * grid.z, kind)) {
    all.block = number;
    builtins.block = dim3(number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y));
    run_block(ordering(block.x * block.y * block.z, kind));
    if (!all.failure.empty()) raise();
  }
}

}  // namespace

void begin(const char* operation) {
  abandon();
  m().operation = operation;
}

void buffer(const void* data, I64 bytes, Use use) {
  if (bytes == 0) return;
  Buffer one{static_cast<const unsigned char*>(data), bytes, use, std::vector<Byte>(bytes)};
  if (use != Use::out)
    for (Byte& byte : one.shadow) byte.known = true;
  if (use == Use::out) std::memset(const_cast<void*>(data), 0xff, bytes);  // what is not written is not a number
  m().buffers.push_back(std::move(one));
}

void end() {
  std::string missing;
  for (const Buffer& one : m().buffers)
    for (I64 i = 0; i < one.bytes && missing.empty(); ++i)
      if (!one.shadow[i].known)
        missing = m().operation + ": byte " + std::to_string(i) + " of a result of " + std::to_string(one.bytes) + " was never written";
  abandon();
  if (!missing.empty()) throw std::runtime_error(missing);
}

void abandon() {
  m().buffers.clear();
  m().failure.clear();
  m().current = -1;
}

void run(const char* kernel, dim3 grid, dim3 block, I64 shared_bytes, const void* closure, I64 bytes,
         void (*body)(const void*)) {
  Machine& all = m();
  const I64 threads = I64(block.x) * block.y * block.z;
  const std::string who = all.operation + ", kernel " + kernel + ": ";
  if (threads < 1 || threads > kMaxThreads) throw std::runtime_error(who + std::to_string(threads) + " threads in a block");
  if (!grid.x || !grid.y || !grid.z) throw std::runtime_error(who + "a grid without a block");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error(who + "a grid has at most 65535 blocks along y and z");
  if (shared_bytes > kStatic) throw std::runtime_error(who + "more dynamic shared memory than a launch has unasked");
  if (all.stacks == nullptr)
    all.stacks = static_cast<unsigned char*>(
        mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  all.kernel = kernel, all.closure = static_cast<const unsigned char*>(closure), all.closure_bytes = bytes;
  all.body = body, all.dynamic_bytes = shared_bytes, all.num_threads = static_cast<int>(threads);
  builtins.block_size = block, builtins.grid_size = grid;
  all.thread_ids.clear();
  for (unsigned z = 0; z < block.z; ++z)
    for (unsigned y = 0; y < block.y; ++y)
      for (unsigned x = 0; x < block.x; ++x) all.thread_ids.push_back(dim3(x, y, z));
  const Contents before = contents();
  run_grid(grid, block, 0);
  const Contents after = contents();
  for (int kind : {1, 2}) {
    restore(before);
    run_grid(grid, block, kind);
    if (contents() != after) throw std::runtime_error(who + "another order of threads and blocks leaves other bits");
  }
}

void sync_block(const char* file, int line) { wait(State::at_block, file, line); }

static std::uint64_t meet(unsigned mask, std::uint64_t bits, int source, const char* file, int line) {
  Machine& all = m();
  const int me = lane();
  if (!(mask >> me & 1)) fail("it is not in the mask of the shuffle at " + at(file, line));
  if (!(mask >> source & 1)) fail("it reads a lane outside the mask at " + at(file, line));
  for (int other = 0; other < kLanes; ++other) {
    const int thread = all.current / kLanes * kLanes + other;
    if ((mask >> other & 1) && (thread >= all.num_threads || all.fibers[thread].state == State::done))
      fail("lane " + std::to_string(other) + " of the mask has ended or was never there, at " + at(file, line));
  }
  auto& records = all.warps[all.current / kLanes];
  size_t place = 0;
  for (; place < records.size(); ++place)
    if (records[place].mask == mask && !(records[place].arrived >> me & 1)) break;
  if (place == records.size()) {
    for (place = 0; place < records.size() && records[place].mask; ++place) {}
    if (place == records.size()) records.emplace_back();
    records[place] = Exchange{};
    records[place].mask = mask, records[place].file = file, records[place].line = line;
  }
  if (records[place].line != line || std::strcmp(records[place].file, file) != 0)
    fail("lanes of a warp meet at two places, " + at(file, line) + " and " + at(records[place].file, records[place].line));
  records[place].values[me] = bits;
  records[place].arrived |= 1u << me;
  if (records[place].arrived == mask) {
    for (int other = 0; other < kLanes; ++other)
      if (mask >> other & 1) all.fibers[all.current / kLanes * kLanes + other].state = State::ready;
  } else {
    wait(State::at_warp, file, line);
  }
  Exchange& record = all.warps[all.current / kLanes][place];
  const std::uint64_t found = record.values[source];
  record.left |= 1u << me;
  if (record.left == mask) record.mask = 0;
  return found;
}

std::uint64_t exchange(unsigned mask, std::uint64_t bits, int source, const char* file, int line) {
  return meet(mask, bits, source, file, line);
}

void sync_warp(unsigned mask, const char* file, int line) {
  meet(mask, 0, lane(), file, line);
  ++self().warp_epoch;
}

void* shared(I64 bytes, I64 align, const char* file, int line) {
  Machine& all = m();
  for (const Site& site : all.sites)
    if (site.line == line && std::strcmp(site.file, file) == 0) return all.arena + site.offset;
  const I64 offset = (all.arena_used + std::max<I64>(align, 16) - 1) / 16 * 16;
  all.arena_used = offset + bytes + kGap;  // the gap shows an index past the end
  if (bytes > kStatic || all.arena_used > kArena) fail("too much shared memory at " + at(file, line));
  all.sites.push_back({file, line, offset, bytes});
  return all.arena + offset;
}

void* dynamic_shared() { return m().arena; }

void check_aligned(const void* pointer, I64 bytes, const char* file, int line) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes)
    fail("an address that is not a multiple of " + std::to_string(bytes) + ", at " + at(file, line));
}

unsigned atomic(void* address, unsigned value, unsigned (*change)(unsigned, unsigned)) {
  access(address, 4, true, __builtin_return_address(0), true);
  unsigned old;
  std::memcpy(&old, address, 4);
  value = change(old, value);
  std::memcpy(address, &value, 4);
  return old;
}

int lane() { return m().current % kLanes; }

}  // namespace emulation

#define SEEN(NAME, SIZE, WRITE) \
  void NAME(void* address) { emulation::access(address, SIZE, WRITE, __builtin_return_address(0)); }
#define SEEN_BOTH(SIZE)                             \
  SEEN(__tsan_read##SIZE, SIZE, false)              \
  SEEN(__tsan_write##SIZE, SIZE, true)              \
  SEEN(__tsan_unaligned_read##SIZE, SIZE, false)    \
  SEEN(__tsan_unaligned_write##SIZE, SIZE, true)    \
  SEEN(__tsan_volatile_read##SIZE, SIZE, false)     \
  SEEN(__tsan_volatile_write##SIZE, SIZE, true)

extern "C" {
SEEN_BOTH(1)
SEEN_BOTH(2)
SEEN_BOTH(4)
SEEN_BOTH(8)
SEEN_BOTH(16)
void __tsan_read_range(void* address, unsigned long size) { emulation::access(address, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* address, unsigned long size) { emulation::access(address, size, true, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
}
