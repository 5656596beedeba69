#include "lane.hpp"

#include <algorithm>

namespace collectives {

void Lane::perform(std::unique_lock<std::mutex>& lock, const std::shared_ptr<Job>& job, const Patience& patience) {
  busy_ = true;
  std::exception_ptr error = broken_;
  if (!error && !job->done) {
    lock.unlock();
    try {
      job->run(patience);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
  }
  if (!job->done) job->error = error;
  if (error) broken_ = error;
  job->done = true;
  busy_ = false;
  changed_.notify_all();
}

bool Lane::run(const std::shared_ptr<Job>& job, const Patience& patience) {
  std::unique_lock lock(mutex_);
  if (busy_ || !queue_.empty()) return false;
  perform(lock, job, patience);
  return true;
}

void Lane::queue(const std::shared_ptr<Job>& job) {
  std::unique_lock lock(mutex_);
  queue_.push_back(job);
  if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  changed_.notify_all();
}

bool Lane::idle() {
  std::unique_lock lock(mutex_);
  return !busy_ && queue_.empty() && !broken_;
}

bool Lane::finished(const Job& job) {
  std::unique_lock lock(mutex_);
  return job.done;
}

void Lane::wait(const std::shared_ptr<Job>& job, const Patience& patience) {
  std::unique_lock lock(mutex_);
  while (!job->done) {
    if (!busy_ && !queue_.empty() && queue_.front() == job) {  // nobody has begun it: no other thread is needed
      queue_.pop_front();
      perform(lock, job, patience);
    } else if (patience.until == Clock::time_point::max()) {
      changed_.wait(lock);
    } else if (changed_.wait_until(lock, patience.until) == std::cv_status::timeout && !job->done) {
      throw TimedOut("Timed out waiting for a peer over shared memory.");
    }
  }
  if (job->error) std::rethrow_exception(job->error);
}

std::shared_ptr<Job> Lane::take(const std::function<bool(const Job&)>& meets) {
  std::unique_lock lock(mutex_);
  const auto found = std::find_if(queue_.begin(), queue_.end(), [&](const auto& job) { return meets(*job); });
  if (found == queue_.end()) return nullptr;
  auto job = *found;
  queue_.erase(found);
  return job;
}

void Lane::finish(Job& job, std::exception_ptr error) {
  std::unique_lock lock(mutex_);
  job.error = error;
  job.done = true;
  changed_.notify_all();
}

void Lane::stop() {
  {
    std::unique_lock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
  std::unique_lock lock(mutex_);
  for (auto& job : queue_) {
    job->error = std::make_exception_ptr(Aborted("The group was destroyed before this began."));
    job->done = true;
  }
  queue_.clear();
  changed_.notify_all();
}

void Lane::loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopping_ || (!queue_.empty() && !busy_); });
    if (stopping_) return;
    auto job = queue_.front();
    queue_.pop_front();
    perform(lock, job, Patience{});
  }
}

}  // namespace collectives
