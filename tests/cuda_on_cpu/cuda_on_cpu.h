// The machine that the CUDA kernels of csrc/cuda ask for, on the CPU: every thread of a cluster (or of a block) is a fiber, the fibers
// take turns wherever threads may wait for each other, and what a real machine leaves to chance is chosen here against the program.
// Fibers run in a shuffled order, asynchronous copies land when they are waited for and no earlier, shared memory begins as NaN, and the
// exponential is as far off as it may be. What the machine demands is checked: 16-byte accesses are aligned, every lane takes part in a
// shuffle of the same kind, every thread reaches a barrier, another block's memory is written only while that block is known to run, and no
// copy is left under way.
//
// Not seen: races between two barriers (fibers are never interrupted elsewhere), caches, the order of memory accesses, registers, speed.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define DEVICE_FN inline
#define ROW_KERNEL(threads, blocks) inline void
#define HAS_CLUSTERS 1

namespace urlvr::cuda {

namespace machine {

constexpr size_t STACK = 64 * 1024;
constexpr int LANES = 32;
constexpr size_t MOST_SHARED = 227 * 1024;

inline void demand(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

// Something that `members` threads wait at for each other.
struct Barrier {
  int members = 0, arrived = 0, passed = 0;
  std::vector<int> waiting;  // fibers
};

struct Warp {
  Barrier barrier;
  int kind = -1;  // of the collective under way
  uint32_t value[LANES];
};

struct Block {
  unsigned index;
  char* shared;
  std::vector<Warp> warps;
  Barrier barrier;
  int running;
};

struct Copy {
  char* to;
  const char* from;
};

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  char* stack = nullptr;
  bool started, done;
  int thread, block;
  int cluster_arrivals, cluster_waits;
  std::vector<Copy> copies;
};

struct Machine {
  std::mt19937 chance{0};
  bool shuffle = false;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> blocks;  // of the cluster
  std::vector<int> ready;
  std::vector<char> shared;
  size_t shared_bytes = 0;
  int block_threads = 0, alive = 0, current = -1;
  int cluster_arrived = 0, cluster_passed = 0;
  std::vector<int> cluster_waiting;
  jmp_buf scheduler;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  std::string error;

  Fiber& fiber() { return *fibers[current]; }
  Block& block() { return blocks[fiber().block]; }
  Warp& warp() { return block().warps[fiber().thread / LANES]; }
};
inline Machine& the() {
  static Machine machine;
  return machine;
}

// Leave the processor; somebody puts this fiber among the ready ones again.
[[gnu::noinline]] inline void sleep() {
  Machine& m = the();
  if (_setjmp(m.fiber().resume) == 0) _longjmp(m.scheduler, 1);
}

inline void wait_at(Barrier& barrier) {
  Machine& m = the();
  if (++barrier.arrived < barrier.members) {
    barrier.waiting.push_back(m.current);
    sleep();
    return;
  }
  barrier.arrived = 0;
  ++barrier.passed;
  m.ready.insert(m.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

// All lanes deposit a value, all read what they like, all leave.
template <class Read>
auto collective(int kind, uint32_t value, const Read& read) {
  Warp& warp = the().warp();
  demand(warp.kind == -1 || warp.kind == kind, "lanes of a warp meet in different collectives");
  warp.kind = kind;
  warp.value[the().fiber().thread % LANES] = value;
  wait_at(warp.barrier);
  const auto out = read(warp.value);
  warp.kind = -1;
  wait_at(warp.barrier);
  return out;
}

inline void run_fiber() {
  Machine& m = the();
  try {
    m.body(m.arguments);
    demand(m.fiber().copies.empty(), "an asynchronous copy was never waited for");
    demand(m.fiber().cluster_arrivals == m.fiber().cluster_waits, "a cluster barrier was arrived at and never waited for");
  } catch (const std::exception& e) {
    if (m.error.empty()) m.error = e.what();
  }
  m.fiber().done = true;
  --m.block().running;
  --m.alive;
  _longjmp(m.scheduler, 1);
}

[[gnu::noinline]] inline void resume(int index) {
  Machine& m = the();
  m.current = index;
  if (_setjmp(m.scheduler) != 0) return;
  Fiber& f = m.fiber();
  if (f.started) _longjmp(f.resume, 1);
  f.started = true;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = STACK;
  f.context.uc_link = nullptr;
  makecontext(&f.context, run_fiber, 0);
  setcontext(&f.context);
}

inline void begin_block(Block& block, unsigned index, int slot, int threads) {
  Machine& m = the();
  block.index = index;
  block.shared = m.shared.data() + slot * ((m.shared_bytes + 15) / 16 * 16);
  block.running = threads;
  block.barrier = Barrier{threads, 0, 0, {}};
  block.warps.assign(threads / LANES, Warp{});
  for (Warp& warp : block.warps) warp.barrier.members = LANES;
}

// The blocks first … first + number − 1 of a grid, together.
inline void run_blocks(unsigned first, int number, int threads) {
  Machine& m = the();
  m.shared.assign(number * ((m.shared_bytes + 15) / 16 * 16) + 16, char(0xff));
  m.blocks.resize(number);
  m.alive = number * threads;
  m.cluster_arrived = m.cluster_passed = 0;
  m.ready.clear();
  while (int(m.fibers.size()) < m.alive) {
    m.fibers.push_back(std::make_unique<Fiber>());
    const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    m.fibers.back()->stack = static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, anonymous, -1, 0));
  }
  for (int slot = 0; slot < number; ++slot) {
    begin_block(m.blocks[slot], first + slot, slot, threads);
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& f = *m.fibers[slot * threads + thread];
      f.started = f.done = false;
      f.thread = thread, f.block = slot;
      f.cluster_arrivals = f.cluster_waits = 0;
      f.copies.clear();
      m.ready.push_back(slot * threads + thread);
    }
  }
  while (m.alive > 0 && m.error.empty()) {
    demand(!m.ready.empty(), "threads wait at a barrier that others never reach");
    const size_t pick = m.shuffle ? m.chance() % m.ready.size() : m.ready.size() - 1;
    std::swap(m.ready[pick], m.ready.back());
    const int next = m.ready.back();
    m.ready.pop_back();
    resume(next);
  }
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

}  // namespace machine

DEVICE_FN int thread_index() { return machine::the().fiber().thread; }
DEVICE_FN unsigned block_index() { return machine::the().block().index; }
DEVICE_FN char* dynamic_shared() { return machine::the().block().shared; }

// ---- arithmetic ----
DEVICE_FN float mul(float a, float b) { return a * b; }
DEVICE_FN float add(float a, float b) { return a + b; }
DEVICE_FN float fma(float a, float b, float c) { return std::fmaf(a, b, c); }
DEVICE_FN float max_number(float a, float b) { return std::fmax(a, b); }
// As far off as the instruction may be, upwards or downwards by what looks like chance but is the same for the same x.
DEVICE_FN float exp2_approx(float x) {
  const float out = std::exp2(x);
  if (out < 0x1p-126f) return 0;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool up = (bits * 2654435761u) >> 31;
  return x == 0 ? 1 : out * (up ? 1 + 0x1p-22f : 1 - 0x1p-22f);
}
DEVICE_FN float reciprocal(float x) { return 1 / x; }
DEVICE_FN float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
DEVICE_FN uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
DEVICE_FN uint32_t funnel_right(uint32_t low, uint32_t high, int bits) {
  return uint32_t(((uint64_t(high) << 32) | low) >> (bits & 31));
}
DEVICE_FN float from_fp16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return (sign ? -1 : 1) * float(mantissa) * 0x1p-24f;
  return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline uint16_t to_fp16(float x) {  // rounded to nearest, ties to even
  const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return uint16_t(0x7fff);
  if (size >= 65520) return uint16_t(sign | 0x7c00);
  if (size < 0x1p-14f) return uint16_t(sign | uint32_t(std::nearbyint(size * 0x1p24f)));
  const uint32_t magnitude = bits & 0x7fffffffu;
  return uint16_t(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}
inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of_float(x);
  return x != x ? uint16_t(0x7fff) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE_FN uint32_t two_fp16(float low, float high) { return to_fp16(low) | uint32_t(to_fp16(high)) << 16; }
DEVICE_FN uint32_t two_bf16(float low, float high) { return to_bf16(low) | uint32_t(to_bf16(high)) << 16; }
DEVICE_FN uint32_t max_of_two(uint32_t a, uint32_t b, Fp16) {
  auto larger = [](uint32_t p, uint32_t q) { return uint32_t(to_fp16(std::fmax(from_fp16(uint16_t(p)), from_fp16(uint16_t(q))))); };
  return larger(a & 0xffff, b & 0xffff) | larger(a >> 16, b >> 16) << 16;
}
DEVICE_FN uint32_t max_of_two(uint32_t a, uint32_t b, Bf16) {
  auto larger = [](uint32_t p, uint32_t q) { return bits_of_float(std::fmax(float_of_bits(p), float_of_bits(q))); };
  return larger(a << 16, b << 16) >> 16 | (larger(a & 0xffff0000u, b & 0xffff0000u) & 0xffff0000u);
}
DEVICE_FN void forget(int&) {}

// ---- memory ----
template <class P>
P* aligned(P* p) {
  machine::demand((reinterpret_cast<uintptr_t>(p) & 15) == 0, "16 bytes are accessed at an address that is not a multiple of 16");
  return p;
}
DEVICE_FN Pack load_kept(const void* p) {
  Pack out;
  std::memcpy(&out, aligned(p), 16);
  return out;
}
DEVICE_FN Pack load_streamed(const void* p) { return load_kept(p); }
DEVICE_FN Pack load_shared(const void* p) { return load_kept(p); }
DEVICE_FN void store_streamed(void* p, Pack v) { std::memcpy(aligned(p), &v, 16); }
DEVICE_FN void copy_async(void* shared, const void* global) {
  machine::the().fiber().copies.push_back({static_cast<char*>(aligned(shared)), static_cast<const char*>(aligned(global))});
}
DEVICE_FN void copy_async_wait() {
  auto& copies = machine::the().fiber().copies;
  for (const machine::Copy& copy : copies) std::memcpy(copy.to, copy.from, 16);
  copies.clear();
}
DEVICE_FN void set_bits(uint32_t* word, uint32_t bits) { *word |= bits; }

// ---- within a warp, a block, a cluster ----
DEVICE_FN void sync_warp() {
  machine::collective(0, 0, [](const uint32_t*) { return 0; });
}
DEVICE_FN void sync_block() { machine::wait_at(machine::the().block().barrier); }
DEVICE_FN float shuffle_xor(float x, int lanes) {
  const int from = (thread_index() % machine::LANES) ^ lanes;
  return machine::collective(100 + lanes, bits_of_float(x), [&](const uint32_t* value) { return float_of_bits(value[from]); });
}
template <class Join>
int reduced(int kind, int x, const Join& join) {
  return machine::collective(kind, uint32_t(x), [&](const uint32_t* value) {
    int out = int(value[0]);
    for (int i = 1; i < machine::LANES; ++i) out = join(out, int(value[i]));
    return out;
  });
}
DEVICE_FN int warp_max(int x) {
  return reduced(1, x, [](int a, int b) { return a > b ? a : b; });
}
DEVICE_FN int warp_min(int x) {
  return reduced(2, x, [](int a, int b) { return a < b ? a : b; });
}
DEVICE_FN int warp_add(int x) {
  return reduced(3, x, [](int a, int b) { return a + b; });
}
DEVICE_FN void cluster_arrive() {
  machine::Machine& m = machine::the();
  machine::demand(m.fiber().cluster_arrivals == m.fiber().cluster_waits, "a thread arrives twice at a cluster barrier without waiting");
  ++m.fiber().cluster_arrivals;
  if (++m.cluster_arrived < int(m.blocks.size()) * m.block_threads) return;
  m.cluster_arrived = 0;
  ++m.cluster_passed;
  m.ready.insert(m.ready.end(), m.cluster_waiting.begin(), m.cluster_waiting.end());
  m.cluster_waiting.clear();
}
DEVICE_FN void cluster_wait() {
  machine::Machine& m = machine::the();
  machine::demand(m.fiber().cluster_arrivals == m.fiber().cluster_waits + 1, "a thread waits at a cluster barrier before it arrives");
  ++m.fiber().cluster_waits;
  if (m.cluster_passed >= m.fiber().cluster_waits) return;
  m.cluster_waiting.push_back(m.current);
  machine::sleep();
}
DEVICE_FN void store_in_cluster(uint32_t* own, int rank, uint32_t value) {
  machine::Machine& m = machine::the();
  machine::demand(m.fiber().cluster_waits > 0, "another block's memory is written before that block is known to have begun");
  machine::Block& to = m.blocks.at(rank);
  machine::demand(to.running == m.block_threads, "another block's memory is written after threads of it have ended");
  const ptrdiff_t offset = reinterpret_cast<char*>(own) - m.block().shared;
  machine::demand(offset >= 0 && size_t(offset) + 4 <= m.shared_bytes, "what is written to another block lies outside its memory");
  std::memcpy(to.shared + offset, &value, 4);
}

// ---- launches ----
using Stream = void*;

template <class... P, class... A>
void launch(const char* op, void (*kernel)(P...), int64_t grid, int block, size_t shared, int cluster, Stream, const A&... arguments) {
  machine::Machine& m = machine::the();
  machine::demand(grid >= 0 && grid <= INT32_MAX, "the grid has an impossible size");
  machine::demand(block > 0 && block <= 1024 && block % machine::LANES == 0, "a block has an impossible size");
  machine::demand(shared <= machine::MOST_SHARED, "a block asks for more shared memory than there is");
  const int together = cluster > 0 ? cluster : 1;
  machine::demand(together <= 8 && grid % together == 0, "the grid does not divide into clusters");
  auto call = [&] { kernel(P(arguments)...); };
  m.body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
  m.arguments = &call;
  m.shared_bytes = shared;
  m.block_threads = block;
  m.error.clear();
  for (int64_t first = 0; first < grid; first += together) {
    try {
      machine::run_blocks(unsigned(first), together, block);
    } catch (const std::exception& e) {
      throw std::runtime_error(std::string(op) + ", block " + std::to_string(first) + ": " + e.what());
    }
  }
}

}  // namespace urlvr::cuda
