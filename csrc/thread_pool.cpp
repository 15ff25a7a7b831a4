#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace i2f {
namespace {

struct Job {
    Work work;
    void* context;
    std::int64_t items;
    int limit;                         // of workers that may join
    int joined = 0;                    // under Pool::mutex
    int active = 0;                    // under Pool::mutex
    std::atomic<std::int64_t> next{0};

    void run(int worker) {
        for (;;) {
            const std::int64_t item = next.fetch_add(1, std::memory_order_relaxed);
            if (item >= items) return;
            work(context, item, worker);
        }
    }
};

struct Pool {
    std::mutex busy;  // held by the call that uses the workers, or by a change of their number
    std::mutex mutex;
    std::condition_variable wake;  // a job has come, or stop
    std::condition_variable done;  // the last active worker has left the job
    Job* job = nullptr;
    bool stop = false;
    std::vector<std::thread> workers;

    void loop() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return stop || (job != nullptr && job->joined < job->limit); });
            if (stop) return;
            Job* mine = job;
            const int worker = ++mine->joined;  // the caller is 0
            ++mine->active;
            lock.unlock();
            mine->run(worker);
            lock.lock();
            if (--mine->active == 0) done.notify_one();
        }
    }

    void resize(int count) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            stop = true;
        }
        wake.notify_all();
        for (std::thread& worker : workers) worker.join();
        workers.clear();
        stop = false;
        try {
            while (static_cast<int>(workers.size()) < count) workers.emplace_back([this] { loop(); });
        } catch (const std::system_error&) {
            // The system gives no more threads: fewer are slower, not wrong.
        }
    }
};

std::atomic<int> wanted{1};

// Never destroyed: workers may outlive static destructors. After a fork the child has no workers and possibly
// locked mutexes, so it gets a fresh pool.
Pool*& pool() {
    static Pool* instance = [] {
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] { pool() = new (std::nothrow) Pool; });
#endif
        return new Pool;
    }();
    return instance;
}

}  // namespace

int threads() { return wanted.load(); }

void set_threads(int count) { wanted.store(count); }

void parallel(std::int64_t items, int limit, Work work, void* context) {
    const int count = threads() < limit ? threads() : limit;
    Job job{work, context, items, count - 1};
    Pool* const shared = count > 1 && items > 1 ? pool() : nullptr;
    std::unique_lock<std::mutex> busy;
    if (shared != nullptr) busy = std::unique_lock<std::mutex>(shared->busy, std::try_to_lock);
    if (!busy.owns_lock()) {
        job.run(0);
        return;
    }
    if (static_cast<int>(shared->workers.size()) != threads() - 1) shared->resize(threads() - 1);
    {
        const std::lock_guard<std::mutex> lock(shared->mutex);
        shared->job = &job;
    }
    shared->wake.notify_all();
    job.run(0);
    std::unique_lock<std::mutex> lock(shared->mutex);
    shared->job = nullptr;  // nobody joins from here on
    shared->done.wait(lock, [&] { return job.active == 0; });
}

}  // namespace i2f
