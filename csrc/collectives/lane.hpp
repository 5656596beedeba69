// Work that runs in order of issue: at once in the caller's thread where nothing is before it, else in a thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "segment.hpp"

namespace collectives {

struct Job {
  std::function<void(const Patience&)> run;
  char* to = nullptr;  // of a receive
  std::uint64_t bytes = 0;
  std::uint32_t tag = 0;
  bool done = false;
  std::exception_ptr error;
};

class Lane {
 public:
  ~Lane() { stop(); }
  // Runs the job here and now where nothing is before it; otherwise when its turn comes. Returns whether it has run.
  bool run(const std::shared_ptr<Job>& job, const Patience& patience);
  void queue(const std::shared_ptr<Job>& job);
  bool idle();
  bool finished(const Job& job);
  void wait(const std::shared_ptr<Job>& job, const Patience& patience);
  // The first queued job that meets a condition leaves the queue; null: there is none.
  std::shared_ptr<Job> take(const std::function<bool(const Job&)>& meets);
  void finish(Job& job, std::exception_ptr error = nullptr);
  void stop();

 private:
  void perform(std::unique_lock<std::mutex>& lock, const std::shared_ptr<Job>& job, const Patience& patience);
  void loop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Job>> queue_;
  std::exception_ptr broken_;  // after an error the ranks no longer agree on what comes
  std::thread thread_;
  bool busy_ = false, stopping_ = false;
};

}  // namespace collectives
