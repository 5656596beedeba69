// Collectives and messages between the ranks of a group on one host. Every rank calls the same collectives in the
// same order. Large ones go in steps through slots that stay in the cache; sums are made in the order of the ranks,
// each element by one rank, so all ranks get the same bits.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "lane.hpp"
#include "reduce.hpp"
#include "segment.hpp"

namespace collectives {

class Group;

// A call under way.
struct Handle {
  std::shared_ptr<Group> group;
  Lane* lane;
  std::shared_ptr<Job> job;
};

struct Message {  // before the bytes of a message
  std::uint64_t bytes;
  std::uint32_t tag;
};

class Group : public std::enable_shared_from_this<Group> {
 public:
  Group(const std::string& path, std::uint64_t nonce, int rank, int ranks, double seconds, bool spins);
  ~Group() { close(); }

  using Address = std::uintptr_t;
  using Begun = std::unique_ptr<Handle>;  // null: it is done
  Begun all_reduce(Address data, std::size_t count, int type, int op, bool later);
  Begun reduce_scatter(Address in, Address out, std::size_t count, int type, int op, bool later);
  Begun all_gather(Address in, Address out, std::size_t bytes, bool later);
  Begun all_to_all(Address in, Address out, std::vector<std::size_t> sent, std::vector<std::size_t> received,
                   bool later);
  Begun broadcast(Address data, std::size_t bytes, int root, bool later);
  Begun gather(Address in, std::vector<Address> outs, std::size_t bytes, int root, bool later);
  Begun send(Address data, std::size_t bytes, int peer, std::uint32_t tag);
  Begun receive(Address data, std::size_t bytes, int peer, std::uint32_t tag);

  Patience patience(double seconds = 0) const;
  void close();
  int fd() const { return segment_.fd; }

 private:
  struct Peer {  // this rank's ends of the two rings
    Lane sending, receiving;
    std::map<std::uint32_t, std::vector<std::vector<char>>> unexpected;  // messages by tag that nobody asked for yet
  };
  struct Sum {
    Type type;
    Op op;
    std::size_t width;
  };

  Begun start(std::function<void(const Patience&)> run, bool later);
  void begin(std::uint32_t step, const Signature& mine, const Patience& patience, const char* what);
  void post(std::uint32_t step);
  void finish(std::uint32_t step);
  void await_part(std::uint32_t step, int peer, const Signature& mine, bool first, const Patience& patience,
                  const char* what);
  template <typename Put, typename Get>
  void steps(std::size_t count, const Signature& mine, const Patience& patience, const char* what, Put put, Get get);

  void sum_small(char* data, std::size_t count, const Sum& sum, const Patience& patience);
  void sum_large(char* data, std::size_t count, const Sum& sum, const Patience& patience);
  void scatter_sums(const char* in, char* out, std::size_t count, const Sum& sum, const Patience& patience);
  void exchange(const char* in, char* out, const std::vector<std::size_t>& sent,
                const std::vector<std::size_t>& received, const Patience& patience);

  void write(int peer, const char* from, std::size_t bytes, const Patience& patience);
  void read(int peer, char* to, std::size_t bytes, const Patience& patience);
  void send_message(int peer, const Job& job, const Patience& patience);
  bool is_there(int peer, const Job& job);
  void receive_message(int peer, Job& job, const Patience& patience);

  Segment segment_;
  const int rank_, ranks_;
  const double seconds_;
  const bool spins_;
  std::uint32_t step_ = 0;
  Lane lane_;
  std::vector<std::unique_ptr<Peer>> peers_;
  bool closed_ = false;
};

}  // namespace collectives
