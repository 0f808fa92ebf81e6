/* ---- threads ----

   Workers help with a job where they are free; nobody waits for one that has not begun. Where another program holds their
   core, as on a shared machine, the caller does all of the work itself instead of waiting at a barrier for the system's
   next time slice, which is what an OpenMP region does: there one busy neighbour made a pass forty times as long. */

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#define MOST_WORKERS 255
#define SPINS 4000 /* looks for the next job before a worker sleeps: the next operation of a pass comes within them */

static struct {
  pthread_mutex_t lock;
  pthread_cond_t wake;
  void (*body)(void *, int thread);
  void *shared;
  long number; /* of the latest job */
  long open;   /* the job that workers may begin, 0 for none */
  int inside, sleeping, workers, wanted, claimed;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

#define READ(field) __atomic_load_n(&pool.field, __ATOMIC_SEQ_CST)
#define WRITE(field, value) __atomic_store_n(&pool.field, value, __ATOMIC_SEQ_CST)
#define ADD(field, value) __atomic_fetch_add(&pool.field, value, __ATOMIC_SEQ_CST)

static inline void pause_a_little(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

static void wait_for_job(long seen) {
  for (long spins = 0; spins < SPINS; spins++) {
    if (READ(number) != seen) return;
    pause_a_little();
  }
  pthread_mutex_lock(&pool.lock);
  ADD(sleeping, 1);
  while (READ(number) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
  ADD(sleeping, -1);
  pthread_mutex_unlock(&pool.lock);
}

static void *help(void *pointer) {
  const long index = (long)(intptr_t)pointer;
  for (long seen = 0;;) {
    wait_for_job(seen);
    seen = READ(number);
    if (index >= READ(wanted)) continue;
    ADD(inside, 1); /* before the look: who closes a job looks the other way round */
    if (READ(open) == seen) pool.body(pool.shared, (int)index + 1);
    ADD(inside, -1);
  }
  return 0;
}

/* A child process has none of its parent's threads. */
static void forget_workers(void) {
  pthread_mutex_init(&pool.lock, 0);
  pthread_cond_init(&pool.wake, 0);
  pool.open = 0;
  pool.inside = pool.sleeping = pool.workers = pool.claimed = 0;
}

static void hire(int wanted) {
  static int watched;
  if (!watched) watched = pthread_atfork(0, 0, forget_workers) == 0;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the caller's */
  while (pool.workers < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, 0, help, (void *)(intptr_t)pool.workers)) break; /* then there are fewer */
    pthread_detach(thread);
    pool.workers++;
  }
  pthread_sigmask(SIG_SETMASK, &before, 0);
}

/* `body` in the calling thread, number 0, and in others that are free, `threads` at most: it takes work until none is
   left. Where two callers come at a time, the second one works alone. */
static void run_all(void (*body)(void *, int thread), void *shared, long tasks, int threads) {
  if (threads > tasks) threads = (int)tasks;
  if (threads > MOST_WORKERS) threads = MOST_WORKERS;
  if (threads <= 1 || __atomic_exchange_n(&pool.claimed, 1, __ATOMIC_SEQ_CST)) {
    body(shared, 0);
    return;
  }
  if (pool.workers < threads - 1) hire(threads - 1);
  pool.body = body;
  pool.shared = shared;
  WRITE(wanted, threads - 1);
  long job = pool.number + 1;
  WRITE(open, job);
  WRITE(number, job);
  if (READ(sleeping)) {
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
  }
  body(shared, 0);
  WRITE(open, 0);
  for (long spins = 1; READ(inside); spins++) {
    pause_a_little();
    if (spins % SPINS == 0) sched_yield();
  }
  WRITE(claimed, 0);
}

enum { FOR_ATTENTION, FOR_INPUTS, USES };

typedef struct {
  char *kept[USES];
  size_t size[USES];
} thread_memory;

static pthread_key_t memory_key;

static void free_memory(void *pointer) {
  thread_memory *memory = pointer;
  for (int use = 0; use < USES; use++) free(memory->kept[use]);
  free(memory);
}

static void make_memory_key(void) {
  if (pthread_key_create(&memory_key, free_memory)) abort();
}

/* Memory of this thread for a use, kept from call to call until the thread ends. What attention needs grows by a token
   with every pass, so it gets more than it asks for. */
static char *scratch(int use, size_t bytes) {
  static __thread thread_memory *memory;
  if (!memory) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_memory_key);
    memory = calloc(1, sizeof *memory);
    if (!memory || pthread_setspecific(memory_key, memory)) abort();
  }
  if (bytes > memory->size[use]) {
    const size_t size = (bytes + (use == FOR_ATTENTION ? bytes / 2 : 0) + 63) / 64 * 64;
    free(memory->kept[use]);
    memory->kept[use] = aligned_alloc(64, size);
    if (!memory->kept[use]) abort();
    memory->size[use] = size;
  }
  return memory->kept[use];
}

typedef struct {
  void (*task)(const void *, long);
  const void *arguments;
  long tasks;
  long next;
} work;

static void take_tasks(void *pointer, int thread) {
  (void)thread;
  work *shared = pointer;
  for (;;) {
    long index = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
    if (index >= shared->tasks) return;
    shared->task(shared->arguments, index);
  }
}

static void run(void (*task)(const void *, long), const void *arguments, long tasks, int threads) {
  work shared = {task, arguments, tasks, 0};
  run_all(take_tasks, &shared, tasks, threads);
}
