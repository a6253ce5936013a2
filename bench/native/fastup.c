/* fastup: a fake vLLM server that is never the bottleneck.
 *
 * One epoll loop, canned answers, no parsing beyond a scan. Every streamed token carries the
 * monotonic time it was sent as  @t<nanoseconds>;  in its text, so that load.c (same machine, same
 * clock) reads the one-way delay of each token through whatever gateway stands between. What the
 * bytes look like is shapes.c's.
 *
 *   fastup -p 9100 [-m model]
 *
 * Knobs are changed while it runs:
 *   GET /__cfg?think=50&answer=50&gap_us=20000&first_us=0&burst=1
 *     think: tokens the model would think by itself; thinking_token_budget shortens it, and
 *     chat_template_kwargs.enable_thinking=false switches it off. 0: a model that does not think.
 *   GET /__stats   requests, streams, tokens sent, connections, streams open now, streams abandoned
 */
#define _GNU_SOURCE
#include "heap.h"
#include "shapes.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define INBUF (1 << 18)
#define OUTBUF (1 << 16)
#define MAXFD HEAP_MAX

typedef struct {
  waiter next;                          /* when the next token is due; 0 = as fast as it drains */
  int fd, inlen, outlen, outoff, wants_out, is_closing;
  int is_streaming, sent;               /* sent: stamped tokens so far; stream state */
  ask asked;
  course run;
  char *in, *out;
} conn;

static conn *conns[MAXFD];
static int ep, n_open, n_streaming, peak_streams;
static long n_requests, n_streams, n_tokens, n_abandoned;
static struct { int think, answer, burst; uint64_t gap_us, first_us; } knob = {50, 50, 1, 0, 0};

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* ---- connections ---- */

static void drop(conn *c) {
  heap_remove(&c->next);
  if (c->is_streaming) { n_streaming--; n_abandoned++; }
  close(c->fd);
  conns[c->fd] = NULL;
  free(c->in); free(c->out); free(c);
  n_open--;
}

static void want_out(conn *c, int out) {
  if (c->wants_out == out) return;
  struct epoll_event e = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.fd = c->fd};
  epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &e);
  c->wants_out = out;
}

/* Returns -1 when the connection is gone. */
static int flush_out(conn *c) {
  while (c->outoff < c->outlen) {
    ssize_t k = send(c->fd, c->out + c->outoff, c->outlen - c->outoff, MSG_NOSIGNAL);
    if (k < 0) {
      if (errno == EAGAIN) { want_out(c, 1); return 0; }
      drop(c);
      return -1;
    }
    c->outoff += k;
  }
  c->outoff = c->outlen = 0;
  want_out(c, 0);
  return 0;
}

static void put(conn *c, const char *s, int n) {
  if (c->outlen + n > OUTBUF) return;   /* cannot happen: pump() starts from an empty buffer */
  memcpy(c->out + c->outlen, s, n);
  c->outlen += n;
}

static void put_event(conn *c, const char *body, int n) {
  char size[16];
  if (!n) return;
  put(c, size, snprintf(size, sizeof size, "%x\r\n", n + 8));
  put(c, "data: ", 6);
  put(c, body, n);
  put(c, "\n\n\r\n", 4);
}

/* ---- streams ---- */

/* One slot of the stream: a token (or a group of them) with whatever vLLM sends in the same breath,
 * or the end. Returns how many token times it took. */
static int next_slot(conn *c) {
  static char b[1 << 13];
  const ask *a = &c->asked;
  const course *r = &c->run;
  int n = 1;
  if (c->sent == 0) {
    if (a->is_chat) put_event(c, b, role_chunk(b, sizeof b, a, r));
    if (r->think == 0 && r->has_marker) put_event(c, b, marker_chunk(b, sizeof b, a, r));
  }
  if (c->sent < r->think + r->answer) {
    n = group_at(a, r, c->sent);
    put_event(c, b, token_chunk(b, sizeof b, a, r, c->sent, now_ns()));
    n_tokens += n;
    if (c->sent + n == r->think && r->has_marker) put_event(c, b, marker_chunk(b, sizeof b, a, r));
  } else {
    put_event(c, b, finish_chunk(b, sizeof b, a, r));
    put_event(c, b, usage_chunk(b, sizeof b, a, r));
    put_event(c, "[DONE]", 6);
    put(c, "0\r\n\r\n", 5);
  }
  c->sent += n;
  return n;
}

static int handle(conn *c);

/* Push the stream until the clock, the socket or its end says stop; -1 when the connection is gone. */
static int pump(conn *c) {
  while (c->is_streaming) {
    int tokens = c->run.think + c->run.answer;
    if (c->outlen) {                     /* still draining */
      if (flush_out(c) < 0) return -1;
      if (c->outlen) return 0;
    }
    if (c->sent > tokens) {
      c->is_streaming = 0;
      n_streaming--;
      if (c->is_closing) { drop(c); return -1; }
      return handle(c);                  /* a pipelined request may be waiting */
    }
    if (c->next.due) {
      if (c->next.due > now_ns()) { if (c->next.pos < 0) heap_push(&c->next); return 0; }
      heap_remove(&c->next);
      int n = next_slot(c);
      c->next.due = knob.gap_us && c->sent < tokens ? c->next.due + n * knob.gap_us * 1000 : 0;
    } else {
      for (int i = 0; i < knob.burst && c->sent <= tokens; i++) next_slot(c);
    }
  }
  return 0;
}

static void begin_stream(conn *c, const ask *a) {
  static const char h[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                          "cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n";
  put(c, h, sizeof h - 1);
  c->is_streaming = 1;
  c->sent = 0;
  c->asked = *a;
  c->run = plan_course(a, knob.think, knob.answer);
  c->next.due = (knob.gap_us || knob.first_us) ? now_ns() + knob.first_us * 1000 : 0;
  n_streams++;
  if (++n_streaming > peak_streams) peak_streams = n_streaming;
}

/* ---- endpoints ---- */

static void respond(conn *c, const char *status, const char *type, const char *b, int n) {
  char h[256];
  put(c, h, snprintf(h, sizeof h, "HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n", status, type, n));
  put(c, b, n);
}
static void respond_json(conn *c, const char *b, int n) { respond(c, "200 OK", "application/json", b, n); }

/* The value of `key` in the query of a path. */
static long query(const char *q, const char *end, const char *key, long dflt) {
  size_t n = strlen(key);
  for (; q + n < end; q++)
    if ((*q == '?' || *q == '&') && !memcmp(q + 1, key, n) && q[n + 1] == '=') return strtol(q + n + 2, NULL, 10);
  return dflt;
}

static void configure(const char *path, const char *end) {
  knob.think = query(path, end, "think", knob.think);
  knob.answer = query(path, end, "answer", knob.answer);
  knob.gap_us = query(path, end, "gap_us", knob.gap_us);
  knob.first_us = query(path, end, "first_us", knob.first_us);
  knob.burst = query(path, end, "burst", knob.burst);
  if (knob.burst < 1 || knob.burst > 100) knob.burst = 1;
}

static void get(conn *c, const char *path, const char *end) {
  static char b[4096];
#define IS(s) (!strncmp(path, s, sizeof s - 1))
  if (IS("/__cfg")) {
    configure(path, end);
    respond_json(c, "{}", 2);
  } else if (IS("/__stats")) {
    respond_json(c, b, snprintf(b, sizeof b,
      "{\"requests\":%ld,\"streams\":%ld,\"tokens\":%ld,\"connections\":%d,\"open_streams\":%d,"
      "\"abandoned_streams\":%ld,\"peak_streams\":%d}",
      n_requests, n_streams, n_tokens, n_open, n_streaming, n_abandoned, peak_streams));
  } else if (IS("/health")) {
    respond(c, "200 OK", "text/plain", "", 0);
  } else if (IS("/version")) {
    respond_json(c, "{\"version\":\"0.32.0\"}", 20);
  } else if (IS("/v1/models")) {
    respond_json(c, b, model_list(b, sizeof b));
  } else if (IS("/metrics")) {
    respond(c, "200 OK", "text/plain; version=0.0.4", b, snprintf(b, sizeof b,
      "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{model_name=\"bench-model\"} %d\n"
      "# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{model_name=\"bench-model\"} 0\n"
      "# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{model_name=\"bench-model\"} 0\n", n_streaming));
  } else {                               /* other routers probe for their own engines' pages */
    respond_json(c, "{\"status\":\"ok\"}", 15);
  }
}

static void post(conn *c, const char *path, int n, const char *body, int blen) {
  static char b[OUTBUF - 512];
#define ENDS(s) (n >= (int)sizeof s - 1 && !memcmp(path + n - (sizeof s - 1), s, sizeof s - 1))
  if (ENDS("/completions")) {
    ask a = read_ask(body, blen, ENDS("/chat/completions"));
    if (a.is_stream) { begin_stream(c, &a); return; }
    course r = plan_course(&a, knob.think, ANSWER_TOKENS);
    respond_json(c, b, plain_answer(b, sizeof b, &a, &r));
  } else if (ENDS("/tokenize")) {
    respond_json(c, b, tokenized(b, sizeof b, body, blen));
  } else if (ENDS("/detokenize")) {
    respond_json(c, b, detokenized(b, sizeof b, body, blen));
  } else if (ENDS("/render") || ENDS("/derender")) {
    respond(c, "403 Forbidden", "application/json", "{\"detail\":\"Forbidden\"}", 22);
  } else {
    respond(c, "404 Not Found", "application/json", "{\"detail\":\"Not Found\"}", 22);
  }
}

/* ---- HTTP ---- */

/* Fold a chunked body together in place. Returns its length and sets *used (bytes of the framing
 * and the body), or -1 when it has not all arrived. */
static int fold_chunks(char *start, char *lim, int *used) {
  char *r = start, *w = start;
  for (long k = 1; k;) {                 /* measure first: nothing moves until everything is there */
    char *eol = memmem(r, lim - r, "\r\n", 2);
    if (!eol) return -1;
    k = strtol(r, NULL, 16);
    if (lim - (eol + 2) < k + 2) return -1;
    r = eol + 2 + k + 2;
  }
  char *stop = r;
  for (r = start;;) {
    char *data = (char *)memmem(r, stop - r, "\r\n", 2) + 2;
    long k = strtol(r, NULL, 16);
    if (k == 0) break;
    memmove(w, data, k);
    w += k;
    r = data + k + 2;
  }
  *used = stop - start;
  return w - start;
}

/* Answer every complete request in the input buffer; -1 when the connection is gone. */
static int handle(conn *c) {
  while (!c->is_streaming && c->inlen) {
    char *end = memmem(c->in, c->inlen, "\r\n\r\n", 4);
    if (!end) break;
    int hlen = end - c->in + 4, blen = 0, used = 0, is_chunked = 0;
    for (char *l = memchr(c->in, '\n', hlen); l && l < end; l = memchr(l, '\n', end - l)) {
      l++;
      if (!strncasecmp(l, "content-length:", 15)) used = blen = atoi(l + 15);
      else if (!strncasecmp(l, "transfer-encoding:", 18)) is_chunked = 1;
      else if (!strncasecmp(l, "connection: close", 17)) c->is_closing = 1;
    }
    char *body = c->in + hlen;
    if (is_chunked && (blen = fold_chunks(body, c->in + c->inlen, &used)) < 0) break;
    used += hlen;
    if (c->inlen < used) break;
    char *space = memchr(c->in, ' ', hlen), *path = space ? space + 1 : c->in;
    char *path_end = memchr(path, ' ', end - path);
    if (!path_end) path_end = end;
    n_requests++;
    if (!strncmp(c->in, "POST", 4)) post(c, path, path_end - path, body, blen);
    else get(c, path, path_end);
    memmove(c->in, c->in + used, c->inlen - used);
    c->inlen -= used;
    if (c->is_streaming) return pump(c);
    if (flush_out(c) < 0) return -1;
    if (c->is_closing && !c->outlen) { drop(c); return -1; }
  }
  return 0;
}

static void on_readable(conn *c) {
  for (;;) {
    if (c->inlen >= INBUF) { drop(c); return; }
    ssize_t k = recv(c->fd, c->in + c->inlen, INBUF - c->inlen, 0);
    if (k == 0) { drop(c); return; }
    if (k < 0) { if (errno != EAGAIN) drop(c); return; }
    int is_full = k == INBUF - c->inlen;
    c->inlen += k;
    if (handle(c) < 0 || !is_full) return;
  }
}

static void accept_all(int ls) {
  for (int fd, one = 1; (fd = accept4(ls, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
    if (fd >= MAXFD) { close(fd); continue; }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    conn *c = calloc(1, sizeof *c);
    *c = (conn){.fd = fd, .next = {0, -1}, .in = malloc(INBUF), .out = malloc(OUTBUF)};
    conns[fd] = c;
    n_open++;
    struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
  }
}

static int listen_on(int port) {
  int ls = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
  setsockopt(ls, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port)};
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (bind(ls, (void *)&a, sizeof a) || listen(ls, 4096)) { perror("listen"); exit(1); }
  struct epoll_event e = {.events = EPOLLIN, .data.fd = ls};
  epoll_ctl(ep, EPOLL_CTL_ADD, ls, &e);
  return ls;
}

int main(int argc, char **argv) {
  int port = 9100;
  const char *model = "bench-model";
  for (int o; (o = getopt(argc, argv, "p:m:")) != -1;) {
    if (o == 'p') port = atoi(optarg);
    else if (o == 'm') model = optarg;
    else return 2;
  }
  signal(SIGPIPE, SIG_IGN);
  shapes_init(model);
  ep = epoll_create1(0);
  int ls = listen_on(port);
  struct epoll_event ev[256];
  for (;;) {
    struct timespec ts, *tp = NULL;
    if (heap_n) {
      uint64_t t = now_ns(), d = heap[0]->due > t ? heap[0]->due - t : 0;
      ts = (struct timespec){d / 1000000000ull, d % 1000000000ull};
      tp = &ts;
    }
    int n = epoll_pwait2(ep, ev, 256, tp, NULL);
    for (int i = 0; i < n; i++) {
      if (ev[i].data.fd == ls) { accept_all(ls); continue; }
      conn *c = conns[ev[i].data.fd];
      if (!c) continue;
      if (ev[i].events & EPOLLOUT && (c->is_streaming ? pump(c) : flush_out(c)) < 0) continue;
      if (ev[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(c);
    }
    for (uint64_t t = now_ns(); heap_n && heap[0]->due <= t;) {
      conn *c = (conn *)heap[0];
      heap_remove(&c->next);
      pump(c);
    }
  }
}
