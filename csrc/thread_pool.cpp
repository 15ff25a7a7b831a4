#include "thread_pool.h"

#include <algorithm>
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
#if defined(__linux__)
#include <sched.h>
#endif

namespace i2f {
namespace {

// Looks for what another thread is about to do, before sleeping until it has: some tens of microseconds, about what it
// takes to be woken up. A click is some twenty parallel regions with little between them.
constexpr int kLooks = 2000;

template <class Condition>
void look_for(const Condition& holds) {
    for (int look = 0; look < kLooks && !holds(); ++look) {
#if defined(__x86_64__) && defined(__GNUC__)
        __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
        asm volatile("yield");
#endif
    }
}

struct Job {
    Work work;
    void* context;
    std::int64_t items;
    int limit;                         // of workers that may join
    int joined = 0;                    // under Pool::mutex
    std::atomic<int> active{0};        // changed under Pool::mutex
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
    std::atomic<std::uint32_t> changes{0};  // of `job` to another one, or of `stop`
    bool stop = false;
    std::vector<std::thread> workers;
    int avoided = -1;  // the core that workers keep off; under `busy`

    void loop() {
        std::unique_lock<std::mutex> lock(mutex);
        for (;;) {
            wake.wait(lock, [&] { return stop || (job != nullptr && job->joined < job->limit); });
            if (stop) return;
            Job* mine = job;
            const int worker = ++mine->joined;  // the caller is 0
            ++mine->active;
            const std::uint32_t seen = changes.load(std::memory_order_relaxed);
            lock.unlock();
            mine->run(worker);
            lock.lock();
            if (--mine->active == 0) done.notify_one();
            lock.unlock();
            look_for([&] { return changes.load(std::memory_order_relaxed) != seen; });
            lock.lock();
        }
    }

    void resize(int count) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            stop = true;
            ++changes;
        }
        wake.notify_all();
        for (std::thread& worker : workers) worker.join();
        workers.clear();
        stop = false;
        avoided = -1;
        try {
            while (static_cast<int>(workers.size()) < count) workers.emplace_back([this] { loop(); });
        } catch (const std::system_error&) {
            // The system gives no more threads: fewer are slower, not wrong.
        }
    }

    // Let workers run on any core but the caller's. After a pause of some ten milliseconds, which is every pause between
    // two clicks, Linux likes to wake a worker on the core of the thread that called it: where cores share no cache
    // (virtual machines say so) it then waits for two to nine milliseconds beside an idle core, longer than a click.
    // Nothing is done while the caller stays where it was.
    void keep_off_callers_core() {
#if defined(__linux__)
        const int here = sched_getcpu();
        if (here == avoided || here < 0 || here >= CPU_SETSIZE) return;
        avoided = here;
        cpu_set_t cores;
        if (sched_getaffinity(0, sizeof cores, &cores) != 0) return;  // more cores than a set holds
        CPU_CLR(here, &cores);
        if (CPU_COUNT(&cores) == 0) return;  // one core: there is no other
        for (std::thread& worker : workers) pthread_setaffinity_np(worker.native_handle(), sizeof cores, &cores);
#endif
    }
};

std::atomic<int> wanted{1};
thread_local int own_limit = 0;

struct Pools {
    Pool click;
    Pool image;
};

// Never destroyed: workers may outlive static destructors. After a fork the child has no workers and possibly locked
// mutexes, so it gets fresh pools, in the same place: at that moment nothing may be allocated, for the lock of the
// allocator may be held by a thread that is no more.
alignas(Pools) unsigned char storage[sizeof(Pools)];

Pools* const pools = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { new (storage) Pools; });
#endif
    return new (storage) Pools;
}();

}  // namespace

int threads() { return wanted.load(); }

void set_threads(int count) { wanted.store(count); }

void limit_threads(int count) { own_limit = count; }

void parallel(std::int64_t items, int limit, Work work, void* context, Lane lane) {
    int count = std::min(threads(), limit);
    if (own_limit > 0) count = std::min(count, own_limit);
    Job job{work, context, items, count - 1};
    Pool& shared = lane == Lane::click ? pools->click : pools->image;
    std::unique_lock<std::mutex> busy(shared.busy, std::defer_lock);
    if (count > 1 && items > 1) (void)busy.try_lock();
    if (!busy.owns_lock()) {
        job.run(0);
        return;
    }
    if (static_cast<int>(shared.workers.size()) != threads() - 1) shared.resize(threads() - 1);
    shared.keep_off_callers_core();
    {
        const std::lock_guard<std::mutex> lock(shared.mutex);
        shared.job = &job;
        ++shared.changes;
    }
    shared.wake.notify_all();
    job.run(0);
    std::unique_lock<std::mutex> lock(shared.mutex);
    shared.job = nullptr;  // nobody joins from here on
    lock.unlock();
    look_for([&] { return job.active.load(std::memory_order_relaxed) == 0; });
    lock.lock();
    shared.done.wait(lock, [&] { return job.active == 0; });
}

}  // namespace i2f
