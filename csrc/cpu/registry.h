// Objects that Python knows by a number.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "../checks.h"

namespace resnet_fused::cpu {

template <class T>
class Registry {
 public:
  // The name stands in error messages.
  explicit Registry(const char* name) : name_(name) {}

  int64_t add(std::shared_ptr<T> object) {
    const std::lock_guard<std::mutex> lock(mutex_);
    objects_.emplace(next_, std::move(object));
    return next_++;
  }

  // Shared, so that an object that is removed meanwhile outlives its call.
  std::shared_ptr<T> get(int64_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(id);
    RF_CHECK(found != objects_.end(), name_, " is ", id, ", which new_", name_, " didn't give, or which was deleted.");
    return found->second;
  }

  void remove(int64_t id) {
    std::shared_ptr<T> removed;  // freed without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(id);
    if (found == objects_.end()) return;
    removed = std::move(found->second);
    objects_.erase(found);
  }

 private:
  const char* name_;
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<T>> objects_;
  int64_t next_ = 0;
};

}  // namespace resnet_fused::cpu
