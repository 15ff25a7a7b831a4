// Threads for one native call: process-wide pools whose size is the one setting.
//
// Not OpenMP: two OpenMP runtimes in a process (torch brings its own) mean two sets of spinning threads, its workers
// do not survive a fork, and thread sanitizers cannot see through it.
//
// Items are independent and each is computed by exactly one thread, so results do not depend on the number of
// threads. A call that finds its pool busy with another call runs alone, on its own thread: many callers share the
// cores instead of queueing for them. Callers that know of each other take less from the start (limit_threads): who has
// all workers takes the others' cores away from them, and then waits for whoever got one back.
//
// Images have a pool of their own, so that clicks find theirs free while one is encoded, and because workers have the
// priority of the thread that started them: a server that encodes behind clicks does so with all of these threads.
#pragma once

#include <cstdint>

namespace i2f {

using Work = void (*)(void* context, std::int64_t item, int worker);  // must not throw; worker in [0, threads)

int threads();
void set_threads(int count);  // count >= 1, the caller's thread included

// Of calls from this thread, from now on; 0 for no limit but the setting.
void limit_threads(int count);

enum class Lane { click, image };

// Call work(context, item, worker) once for every item in [0, items), on at most `limit` threads, and return after
// the last. A worker number is used by one thread at a time.
void parallel(std::int64_t items, int limit, Work work, void* context, Lane lane = Lane::click);

// The same for a function object, body(item, worker).
template <class Body>
void for_items(std::int64_t items, int limit, const Body& body, Lane lane = Lane::click) {
    parallel(
        items, limit,
        [](void* context, std::int64_t item, int worker) { (*static_cast<const Body*>(context))(item, worker); },
        const_cast<Body*>(&body), lane);
}

}  // namespace i2f
