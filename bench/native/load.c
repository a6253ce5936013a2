/* load: closed-loop HTTP/1.1 load generator for OpenAI-style servers.
 *
 * One epoll loop, keep-alive connections. Understands Content-Length, chunked and read-to-close
 * bodies, and reads the @t<ns>; send stamps that fastup puts in every token, wherever in the JSON
 * a gateway left them: streaming figures are true one-way delays per token. A token is a stamp;
 * what else a gateway writes (a usage chunk, an extension on the last chunk) does not count.
 * Prints one JSON object.
 *
 *   load -p 9100 -c 32 -d 3 -w 0.5 -u /v1/chat/completions -f body.json [-H 'name: value']...
 *     -c connections   -d seconds measured   -w warm-up seconds (not counted)
 *     -n make exactly this many requests, wait for all of them, then stop (-d bounds the time)
 *     -r ramp: spread the first requests over MS
 *     -t tokens expected per stream: a stream with fewer is short
 *     -x hang up in mid-stream after this many tokens; counted as hangups, not as answers
 *     -R requests/s: open loop, paced over the connections; latency then counts
 *        from the time a request was due, so a stalled server cannot hide it
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum body_state { HEAD, SIZED, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, TO_CLOSE };
enum { NOTHING, AT_SIGN, STAMP, DONE_MARK };   /* where in a mark the scanner is; DONE_MARK + k: k read */

typedef struct {
  int fd, is_busy, state, status, head_len, wants_out, closes_after, out_off;
  long left;                     /* bytes left of this body or chunk */
  char head[8192];
  char line[64];
  int line_len;
  uint64_t begun, first, last, start_at, due;
  int mark, tokens, saw_done;
  uint64_t stamp;
} conn;

/* ---- distributions, in tenths of a microsecond ---- */

typedef struct { uint32_t *v; size_t n, cap; } series;
static void add(series *s, uint64_t ns) {
  if (s->n == s->cap) {
    if (s->cap >= 8000000) return;
    s->cap = s->cap ? s->cap * 2 : 65536;
    s->v = realloc(s->v, s->cap * 4);
  }
  uint64_t x = ns / 100;
  s->v[s->n++] = x > 0xffffffffu ? 0xffffffffu : x;
}
static int compare(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return x < y ? -1 : x > y;
}
static void show(const char *key, series *s) {
  if (!s->n) return;
  qsort(s->v, s->n, 4, compare);
  double sum = 0;
  for (size_t i = 0; i < s->n; i++) sum += s->v[i];
#define Q(p) (s->v[(size_t)((s->n - 1) * (p))] / 10.0)
  printf(",\"%s\":{\"n\":%zu,\"mean\":%.1f,\"p50\":%.1f,\"p95\":%.1f,\"p99\":%.1f,\"max\":%.1f}", key, s->n,
         sum / s->n / 10.0, Q(.5), Q(.95), Q(.99), Q(1));
}

/* ---- what to do, and what came of it ---- */

static struct {
  int port, conns, ramp_ms, tokens, hangup_after, is_stream;
  double seconds, warm_s, rate;
  long exactly;
  const char *url, *body_file;
  char headers[4096];
} opt = {.port = 9100, .conns = 1, .seconds = 3, .warm_s = 0.3, .url = "/v1/chat/completions"};

static series latency, ttft, delay, gap;
static struct { long ok, bad, errors, reconnects, tokens, shorts, bytes, hangups, all_ok, all_tokens, started, ended; } seen;
static int status_seen, ep, req_len;
static char *req, sample[512];
static uint64_t t_measure;
static conn *cs;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* ---- one connection ---- */

static void watch(conn *c, int out, int op) {
  struct epoll_event e = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
  epoll_ctl(ep, op, c->fd, &e);
  c->wants_out = out;
}

static int dial(conn *c) {
  int one = 1;
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(opt.port)};
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(c->fd, (void *)&a, sizeof a)) { close(c->fd); c->fd = -1; return -1; }
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  watch(c, 0, EPOLL_CTL_ADD);
  return 0;
}

static void push_request(conn *c) {
  while (c->out_off < req_len) {
    ssize_t k = send(c->fd, req + c->out_off, req_len - c->out_off, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (k < 0) {
      if (errno == EAGAIN && !c->wants_out) watch(c, 1, EPOLL_CTL_MOD);
      return;
    }
    c->out_off += k;
  }
  if (c->wants_out) watch(c, 0, EPOLL_CTL_MOD);
}

static void fire(conn *c, uint64_t t) {
  if (c->fd < 0 && dial(c)) { seen.errors++; c->start_at = t + 10000000; return; }
  c->is_busy = 1; c->state = HEAD; c->head_len = c->status = c->left = c->closes_after = c->out_off = 0;
  c->first = c->last = 0; c->mark = NOTHING; c->tokens = c->saw_done = 0;
  c->begun = c->due ? c->due : t;
  seen.started++;
  push_request(c);
}

static void hang_up(conn *c) { close(c->fd); c->fd = -1; seen.reconnects++; }

static void rest(conn *c, uint64_t t) {
  c->is_busy = 0;
  seen.ended++;
  if (c->closes_after && c->fd >= 0) hang_up(c);
  if (opt.rate > 0) {
    c->due += (uint64_t)(1e9 * opt.conns / opt.rate);
    c->start_at = c->due;
  } else { c->due = 0; c->start_at = t; }
}

static void finish(conn *c, uint64_t t) {
  if (!status_seen || c->status != 200) status_seen = c->status;
  seen.all_ok += c->status == 200;
  if (t >= t_measure) {
    if (c->status == 200 && (!opt.is_stream || c->saw_done)) seen.ok++; else seen.bad++;
    if (c->status == 200) {
      add(&latency, t - c->begun);
      if (opt.is_stream && c->tokens < opt.tokens) seen.shorts++;
    }
  }
  rest(c, t);
}

/* Lost in mid-answer: not an answer, tried no more. */
static void fail(conn *c, uint64_t t) {
  if (t >= t_measure) seen.errors++;
  hang_up(c);
  rest(c, t);
}

static void token(conn *c, uint64_t t) {
  c->tokens++; seen.all_tokens++;
  if (t >= t_measure) {
    seen.tokens++;
    add(&delay, t > c->stamp ? t - c->stamp : 0);
    if (!c->first) add(&ttft, t - c->begun);
    if (c->last) add(&gap, t - c->last);
  }
  if (!c->first) c->first = t;
  c->last = t;
}

/* Look for @t<digits>; and [DONE], which may be split over reads. */
static void scan(conn *c, const char *p, int n, uint64_t t) {
  static const char done[] = "[DONE]";
  if (c->status != 200 && !sample[0]) snprintf(sample, sizeof sample, "%.*s", n > 300 ? 300 : n, p);
  if (!opt.is_stream) return;
  for (int i = 0; i < n; i++) {
    char ch = p[i];
    if (c->mark == AT_SIGN) {
      c->mark = ch == 't' ? STAMP : NOTHING;
      c->stamp = 0;
    } else if (c->mark == STAMP) {
      if (ch >= '0' && ch <= '9') c->stamp = c->stamp * 10 + (ch - '0');
      else { c->mark = NOTHING; token(c, t); }
    } else if (c->mark > DONE_MARK) {
      if (ch != done[c->mark - DONE_MARK]) c->mark = ch == '@' ? AT_SIGN : NOTHING;
      else if (++c->mark == DONE_MARK + 6) { c->saw_done = 1; c->mark = NOTHING; }
    } else {
      const char *q = p + i;
      while (q < p + n && *q != '@' && *q != '[') q++;
      if (q == p + n) return;
      i = q - p;
      c->mark = *q == '@' ? AT_SIGN : DONE_MARK + 1;
    }
  }
}

/* ---- HTTP ---- */

static int parse_head(conn *c) {
  char *h = c->head, *space = strchr(h, ' ');
  c->status = space ? atoi(space + 1) : 0;
  int is_v10 = !strncmp(h, "HTTP/1.0", 8), keeps_alive = 0;
  c->state = TO_CLOSE;
  for (char *l = strchr(h, '\n'); l; l = strchr(l, '\n')) {
    l++;
    if (!strncasecmp(l, "content-length:", 15)) { c->left = atol(l + 15); c->state = SIZED; }
    else if (!strncasecmp(l, "transfer-encoding:", 18)) { c->state = CHUNK_SIZE; c->line_len = 0; }
    else if (!strncasecmp(l, "connection:", 11)) {
      const char *v = l + 11 + strspn(l + 11, " ");
      if (!strncasecmp(v, "close", 5)) c->closes_after = 1;
      if (!strncasecmp(v, "keep-alive", 10)) keeps_alive = 1;
    }
  }
  if (is_v10 && !keeps_alive) c->closes_after = 1;
  return c->state == SIZED && c->left == 0;
}

/* Take what belongs to the head from p; returns how much, and whether the answer is over in *over. */
static int eat_head(conn *c, const char *p, int n, int *over) {
  int room = (int)sizeof c->head - 1 - c->head_len, k = n < room ? n : room;
  int from = c->head_len > 3 ? c->head_len - 3 : 0;
  memcpy(c->head + c->head_len, p, k);
  char *end = memmem(c->head + from, c->head_len + k - from, "\r\n\r\n", 4);
  if (!end) { c->head_len += k; return k; }
  int len = end - c->head + 4, took = len - c->head_len;
  c->head_len = len;
  c->head[len] = 0;
  *over = parse_head(c);
  return took;
}

static int eat_data(conn *c, const char *p, int n, uint64_t t) {
  int k = n < c->left ? n : c->left;
  scan(c, p, k, t);
  c->left -= k;
  return k;
}

static void eat_size(conn *c, char ch) {
  if (ch != '\n') { if (c->line_len < 60) c->line[c->line_len++] = ch; return; }
  c->line[c->line_len] = 0;
  c->line_len = 0;
  c->left = strtol(c->line, NULL, 16);
  c->state = c->left ? CHUNK_DATA : TRAILER;
}

static int eat_trailer(conn *c, char ch) {
  if (ch == '\n') { int is_empty = c->line_len == 0; c->line_len = 0; return is_empty; }
  if (ch != '\r') c->line_len = 1;
  return 0;
}

static void eat(conn *c, const char *p, int n, uint64_t t) {
  while (n > 0 && c->is_busy) {
    int k = 1, over = 0;
    switch (c->state) {
    case HEAD:
      k = eat_head(c, p, n, &over);
      if (!k) { fail(c, t); return; }
      break;
    case SIZED: k = eat_data(c, p, n, t); over = !c->left; break;
    case CHUNK_SIZE: eat_size(c, *p); break;
    case CHUNK_DATA: k = eat_data(c, p, n, t); if (!c->left) c->state = CHUNK_END; break;
    case CHUNK_END: if (*p == '\n') c->state = CHUNK_SIZE; break;
    case TRAILER: over = eat_trailer(c, *p); break;
    case TO_CLOSE: scan(c, p, n, t); k = n; break;
    }
    p += k;
    n -= k;
    if (opt.hangup_after && c->tokens >= opt.hangup_after) { seen.hangups++; hang_up(c); rest(c, t); return; }
    if (over) { finish(c, t); return; }
  }
}

static void on_event(conn *c, uint32_t events) {
  static char buf[1 << 18];
  if (c->fd < 0) return;
  if (events & EPOLLOUT) push_request(c);
  if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
  ssize_t k = recv(c->fd, buf, sizeof buf, MSG_DONTWAIT);
  uint64_t t = now_ns();
  if (k > 0) { seen.bytes += k; eat(c, buf, k, t); }
  else if (k < 0 && errno == EAGAIN) return;
  else if (!c->is_busy) hang_up(c);      /* an idle connection that the server closed */
  else if (k == 0 && c->state == TO_CLOSE) { c->closes_after = 1; finish(c, t); }
  else fail(c, t);
}

/* ---- the run ---- */

static int may_fire(void) { return !opt.exactly || seen.started < opt.exactly; }
static int is_over(void) { return opt.exactly && seen.ended >= opt.exactly; }

static double run(void) {
  uint64_t t = now_ns(), t_begin = t, t_end;
  t_measure = t_begin + (uint64_t)(opt.warm_s * 1e9);
  t_end = t_measure + (uint64_t)(opt.seconds * 1e9);
  for (int i = 0; i < opt.conns; i++) {
    cs[i].fd = -1;
    cs[i].start_at = t_begin + (uint64_t)opt.ramp_ms * 1000000ull * i / opt.conns;
    if (opt.rate > 0) cs[i].due = cs[i].start_at = t_begin + (uint64_t)(1e9 * i / opt.rate);
  }
  struct epoll_event ev[512];
  while (t < t_end && !is_over()) {
    uint64_t soon = t_end;
    for (int i = 0; i < opt.conns; i++) {
      conn *c = &cs[i];
      if (c->is_busy || !may_fire()) continue;
      if (c->start_at <= t) fire(c, t);
      if (!c->is_busy && c->start_at < soon) soon = c->start_at;
    }
    t = now_ns();
    struct timespec ts = {0, 0};
    if (soon > t) ts = (struct timespec){(soon - t) / 1000000000ull, (soon - t) % 1000000000ull};
    int n = epoll_pwait2(ep, ev, 512, &ts, NULL);
    for (int i = 0; i < n; i++) on_event(ev[i].data.ptr, ev[i].events);
    t = now_ns();
  }
  return t > t_measure ? (t - t_measure) / 1e9 : 1e-9;
}

static void read_options(int argc, char **argv) {
  for (int o; (o = getopt(argc, argv, "p:c:d:w:n:u:f:H:r:R:t:x:")) != -1;) {
    if (o == 'p') opt.port = atoi(optarg);
    else if (o == 'c') opt.conns = atoi(optarg);
    else if (o == 'd') opt.seconds = atof(optarg);
    else if (o == 'w') opt.warm_s = atof(optarg);
    else if (o == 'n') opt.exactly = atol(optarg);
    else if (o == 'u') opt.url = optarg;
    else if (o == 'f') opt.body_file = optarg;
    else if (o == 'r') opt.ramp_ms = atoi(optarg);
    else if (o == 'R') opt.rate = atof(optarg);
    else if (o == 't') opt.tokens = atoi(optarg);
    else if (o == 'x') opt.hangup_after = atoi(optarg);
    else if (o == 'H' && strlen(opt.headers) + strlen(optarg) + 3 < sizeof opt.headers) {
      strcat(opt.headers, optarg);
      strcat(opt.headers, "\r\n");
    } else exit(2);
  }
  if (opt.conns > 4000 || opt.seconds > 120) { fprintf(stderr, "refused: bounded to 4000 connections, 120 s\n"); exit(2); }
}

static void build_request(void) {
  char *body = calloc(1, 1 << 20);
  int n = 0;
  if (opt.body_file) {
    FILE *f = fopen(opt.body_file, "r");
    if (!f) { perror(opt.body_file); exit(2); }
    n = fread(body, 1, (1 << 20) - 1, f);
    fclose(f);
  }
  opt.is_stream = strstr(body, "\"stream\": true") || strstr(body, "\"stream\":true");
  req = malloc(n + 8192);
  req_len = n ? sprintf(req, "POST %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\naccept: */*\r\n"
                             "%scontent-length: %d\r\n\r\n", opt.url, opt.port, opt.headers, n)
              : sprintf(req, "GET %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n%s\r\n", opt.url, opt.port, opt.headers);
  memcpy(req + req_len, body, n);
  req_len += n;
  free(body);
}

int main(int argc, char **argv) {
  read_options(argc, argv);
  signal(SIGPIPE, SIG_IGN);
  build_request();
  ep = epoll_create1(0);
  cs = calloc(opt.conns, sizeof *cs);
  double s = run();
  printf("{\"seconds\":%.3f,\"connections\":%d,\"status\":%d,\"ok\":%ld,\"bad\":%ld,\"errors\":%ld,\"short\":%ld,"
         "\"hangups\":%ld,\"unfinished\":%ld,\"reconnects\":%ld,\"requests_per_s\":%.1f,\"tokens\":%ld,"
         "\"tokens_per_s\":%.1f,\"mb\":%.1f,\"all_ok\":%ld,\"all_tokens\":%ld",
         s, opt.conns, status_seen, seen.ok, seen.bad, seen.errors, seen.shorts, seen.hangups, seen.started - seen.ended,
         seen.reconnects, seen.ok / s, seen.tokens, seen.tokens / s, seen.bytes / 1e6, seen.all_ok, seen.all_tokens);
  show("latency_us", &latency); show("ttft_us", &ttft); show("token_delay_us", &delay); show("token_gap_us", &gap);
  if (sample[0]) {
    printf(",\"sample\":\"");
    for (char *p = sample; *p; p++) { if (*p == '"' || *p == '\\') putchar('\\'); if ((unsigned char)*p >= 32) putchar(*p); }
    printf("\"");
  }
  printf("}\n");
  return 0;
}
