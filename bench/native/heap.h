/* heap: a min-heap of those who wait for a moment in time. Header only. */
#ifndef HEAP_H
#define HEAP_H
#include <stdint.h>

#define HEAP_MAX 8192

/* Embedded as the first member of whoever waits. */
typedef struct {
  uint64_t due;   /* ns */
  int pos;        /* -1 when not in the heap */
} waiter;

static waiter *heap[HEAP_MAX];
static int heap_n;

static void heap_set(int i, waiter *w) { heap[i] = w; w->pos = i; }

static void heap_up(int i) {
  waiter *w = heap[i];
  for (; i && heap[(i - 1) / 2]->due > w->due; i = (i - 1) / 2) heap_set(i, heap[(i - 1) / 2]);
  heap_set(i, w);
}

static void heap_down(int i) {
  waiter *w = heap[i];
  for (int k; (k = 2 * i + 1) < heap_n; i = k) {
    if (k + 1 < heap_n && heap[k + 1]->due < heap[k]->due) k++;
    if (heap[k]->due >= w->due) break;
    heap_set(i, heap[k]);
  }
  heap_set(i, w);
}

static void heap_push(waiter *w) { heap_set(heap_n, w); heap_up(heap_n++); }

static void heap_remove(waiter *w) {
  int i = w->pos;
  if (i < 0) return;
  w->pos = -1;
  if (i == --heap_n) return;
  waiter *moved = heap[heap_n];
  heap_set(i, moved);
  heap_down(i);
  heap_up(moved->pos);
}
#endif
