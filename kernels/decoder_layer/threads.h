/* ---- threads ---- */

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

static parallel_fn run_parallel;

void use_threads(void *gomp_parallel) { run_parallel = (parallel_fn)gomp_parallel; }

typedef struct {
  void (*task)(const void *, long);
  const void *arguments;
  long tasks;
  long next;
} work;

static void take_tasks(void *pointer) {
  work *shared = pointer;
  for (;;) {
    long index = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
    if (index >= shared->tasks) return;
    shared->task(shared->arguments, index);
  }
}

/* `body` on as many threads as there is work for. */
static void run_all(void (*body)(void *), void *shared, long tasks, int threads) {
  if (threads > tasks) threads = (int)tasks;
  if (threads > 1 && run_parallel)
    run_parallel(body, shared, (unsigned)threads, 0);
  else
    body(shared);
}

static void run(void (*task)(const void *, long), const void *arguments, long tasks, int threads) {
  work shared = {task, arguments, tasks, 0};
  run_all(take_tasks, &shared, tasks, threads);
}
