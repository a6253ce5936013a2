/* shapes.c: see shapes.h. */
#define _GNU_SOURCE
#include "shapes.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char ANSWER[] =
  "The capital of France is Paris. It lies on the Seine in the north of the country, has been the seat of "
  "government for most of the last thousand years, and is home to a little over two million people within the "
  "city limits and more than ten million in the wider metropolitan area.";

static const char *model = "bench-model";
static char prompt_ids[2][PROMPT_TOKENS * 8];   /* "100,101,..."; [1] ends with the start marker and a newline */

/* ---- writing ---- */

typedef struct { char *out; int cap, len; } pen;

static void text(pen *p, const char *s, int n) {
  if (p->len + n >= p->cap) n = p->cap - 1 - p->len;
  memcpy(p->out + p->len, s, n);
  p->out[p->len += n] = 0;
}
static void lit(pen *p, const char *s) { text(p, s, strlen(s)); }
static void form(pen *p, const char *f, ...) {
  va_list v;
  va_start(v, f);
  int room = p->cap - p->len, n = vsnprintf(p->out + p->len, room, f, v);
  va_end(v);
  p->len += n < room ? n : room - 1;
}

void shapes_init(const char *m) {
  model = m;
  for (int is_open = 0; is_open < 2; is_open++) {
    pen p = {prompt_ids[is_open], sizeof prompt_ids[0], 0};
    for (int i = 0; i < PROMPT_TOKENS; i++) {
      int is_marker = is_open && i == PROMPT_TOKENS - 2;
      form(&p, i ? ",%d" : "%d", is_marker ? (int)THINK_START_ID : 100 + i);
    }
  }
}

/* ---- reading ---- */

/* Where the value of `"key"` begins, or NULL. A scan, not a parser: our own clients and gateways
 * write these keys once, and a fake that parsed would become the bottleneck. */
static const char *value_of(const char *b, int n, const char *key) {
  int k = strlen(key);
  for (const char *p = b, *e = b + n; (p = memmem(p, e - p, key, k)); p += k) {
    const char *q = p + k;
    if (p == b || p[-1] != '"' || q >= e || *q != '"') continue;
    for (q++; q < e && strchr(" :\n\r\t", *q); q++) {}
    return q < e ? q : NULL;
  }
  return NULL;
}
static int is_true(const char *v) { return v && !strncmp(v, "true", 4); }
static int is_false(const char *v) { return v && !strncmp(v, "false", 5); }
static long number(const char *v) { return v && *v >= '0' && *v <= '9' ? atol(v) : -1; }

ask read_ask(const char *b, int n, int is_chat) {
  ask a = {.is_chat = is_chat};
  a.is_stream = is_true(value_of(b, n, "stream"));
  a.wants_ids = is_true(value_of(b, n, "return_token_ids"));
  a.wants_usage = is_true(value_of(b, n, "include_usage"));
  a.wants_continuous_usage = is_true(value_of(b, n, "continuous_usage_stats"));
  a.thinks_off = is_false(value_of(b, n, "enable_thinking")) || is_false(value_of(b, n, "thinking"));
  a.budget = number(value_of(b, n, "thinking_token_budget"));
  a.interval = number(value_of(b, n, "stream_interval"));
  if (a.interval < 1 || a.interval > 64) a.interval = 1;
  a.limit = number(value_of(b, n, "max_completion_tokens"));
  if (a.limit < 0) a.limit = number(value_of(b, n, "max_tokens"));
  return a;
}

/* vLLM forces the end marker as output token budget - 1 (measured: budgets 0/5/20/40 put it at
 * index 0/4/19/39), so a budget of B leaves B - 1 tokens of thinking. */
course plan_course(const ask *a, int think, int answer) {
  course p = {.answer = answer};
  if (a->is_chat && !a->thinks_off && think > 0) {
    p.is_open = 1;
    p.think = think;
    if (a->budget >= 0 && a->budget - 1 < think) p.think = a->budget ? a->budget - 1 : 0;
    p.has_marker = 1;
  }
  if (a->limit >= 0 && a->limit < output_tokens(&p)) {
    p.is_cut = 1;
    if (p.think + p.has_marker >= a->limit) { p.think = a->limit; p.has_marker = 0; }
    p.answer = a->limit - p.think - p.has_marker;
  }
  return p;
}

int output_tokens(const course *p) { return p->think + p->has_marker + p->answer; }

/* ---- stream chunks ---- */

static const char FINGERPRINT[] = "\"system_fingerprint\":\"vllm-0.32.0-bench\"";

static void usage(pen *p, int completion) {
  form(p, "\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":%d", PROMPT_TOKENS,
       PROMPT_TOKENS + completion, completion);
}
static void final_usage(pen *p, const course *c, int completion, const char *more) {
  usage(p, completion);
  form(p, ",\"prompt_tokens_details\":{\"cached_tokens\":%d,\"created_cache_tokens\":0%s},"
          "\"completion_tokens_details\":{\"reasoning_tokens\":%d}}", CACHED_TOKENS, more, c->think);
}

static void chunk_head(pen *p, const ask *a) {
  form(p, a->is_chat
    ? "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"%s\",\"choices\":["
    : "{\"id\":\"cmpl-bench\",\"object\":\"text_completion\",\"created\":1700000000,\"model\":\"%s\",\"choices\":[", model);
}

static void chunk_tail(pen *p, const ask *a, int completion) {
  lit(p, "]");
  if (a->wants_continuous_usage) { lit(p, ","); usage(p, completion); lit(p, "}"); }
}

int role_chunk(char *out, int cap, const ask *a, const course *c) {
  pen p = {out, cap, 0};
  chunk_head(&p, a);
  lit(&p, "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}");
  chunk_tail(&p, a, 0);
  if (a->wants_ids) form(&p, ",\"prompt_token_ids\":[%s],\"prompt_text\":null}", prompt_ids[c->is_open]);
  else lit(&p, ",\"prompt_token_ids\":null,\"prompt_text\":null}");
  return p.len;
}

static int id_of(const course *c, int i) { return i < c->think ? 1000 + i : 2000 + i - c->think; }

static void token_id(pen *p, const ask *a, int id) {
  if (a->wants_ids) form(p, "\"token_ids\":[%d]}", id);
  else lit(p, "\"token_ids\":null}");
}

/* The first token goes out alone; a group is of one kind, as its text is under one key. */
int group_at(const ask *a, const course *c, int i) {
  int left = (i < c->think ? c->think : c->think + c->answer) - i;
  return i == 0 || a->interval == 1 ? 1 : a->interval < left ? a->interval : left;
}

int token_chunk(char *out, int cap, const ask *a, const course *c, int i, uint64_t sent_ns) {
  pen p = {out, cap, 0};
  int n = group_at(a, c, i), is_think = i < c->think, is_last = c->is_cut && i + n == c->think + c->answer;
  const char *reason = is_last ? "\"length\"" : "null";
  chunk_head(&p, a);
  lit(&p, a->is_chat ? is_think ? "{\"index\":0,\"delta\":{\"reasoning\":\"" : "{\"index\":0,\"delta\":{\"content\":\""
                     : "{\"index\":0,\"text\":\"");
  for (int k = 0; k < n; k++) form(&p, " tok@t%llu;", (unsigned long long)sent_ns);
  form(&p, a->is_chat ? "\"},\"logprobs\":null,\"finish_reason\":%s," : "\",\"logprobs\":null,\"finish_reason\":%s,", reason);
  if (is_last || !a->is_chat) lit(&p, "\"stop_reason\":null,");
  if (!a->is_chat && i == 0 && a->wants_ids) form(&p, "\"prompt_token_ids\":[%s],", prompt_ids[0]);
  else if (!a->is_chat) lit(&p, "\"prompt_token_ids\":null,");
  lit(&p, a->wants_ids ? "\"token_ids\":[" : "\"token_ids\":null}");
  for (int k = 0; a->wants_ids && k < n; k++) form(&p, k ? ",%d" : "%d", id_of(c, i + k));
  if (a->wants_ids) lit(&p, "]}");
  chunk_tail(&p, a, i + n + (is_think ? 0 : c->has_marker));
  if (is_last && !a->wants_usage) form(&p, ",%s", FINGERPRINT);
  lit(&p, "}");
  return p.len;
}

/* The reasoning parser swallows the marker: without token ids vLLM sends no chunk at all for it. */
int marker_chunk(char *out, int cap, const ask *a, const course *c) {
  pen p = {out, cap, 0};
  if (!a->wants_ids) return 0;
  chunk_head(&p, a);
  lit(&p, "{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":null,");
  token_id(&p, a, THINK_END_ID);
  chunk_tail(&p, a, c->think + 1);
  lit(&p, "}");
  return p.len;
}

int finish_chunk(char *out, int cap, const ask *a, const course *c) {
  pen p = {out, cap, 0};
  if (c->is_cut) return 0;
  chunk_head(&p, a);
  form(&p, "{\"index\":0,%s,\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null,",
       a->is_chat ? "\"delta\":{}" : "\"text\":\"\"");
  if (!a->is_chat) lit(&p, "\"prompt_token_ids\":null,");
  token_id(&p, a, STOP_ID);
  chunk_tail(&p, a, output_tokens(c) + 1);
  if (!a->wants_usage) form(&p, ",%s", FINGERPRINT);
  lit(&p, "}");
  return p.len;
}

int usage_chunk(char *out, int cap, const ask *a, const course *c) {
  pen p = {out, cap, 0};
  if (!a->wants_usage) return 0;
  chunk_head(&p, a);
  lit(&p, "],");
  final_usage(&p, c, output_tokens(c) + !c->is_cut, "");
  form(&p, ",%s}", FINGERPRINT);
  return p.len;
}

/* ---- whole answers ---- */

static void output_ids(pen *p, const course *c) {
  lit(p, "[");
  for (int i = 0; i < c->think; i++) form(p, "%d,", 1000 + i);
  if (c->has_marker) form(p, "%d,", THINK_END_ID);
  for (int i = 0; i < c->answer; i++) form(p, "%d,", i == ANSWER_TOKENS - 1 ? STOP_ID : 2000 + i);
  if (p->out[p->len - 1] == ',') p->len--;
  lit(p, "]");
}

static void all_prompt_ids(pen *p, const ask *a, const course *c) {
  lit(p, ",\"prompt_logprobs\":null,\"prompt_token_ids\":");
  if (a->wants_ids) form(p, "[%s]", prompt_ids[c->is_open]); else lit(p, "null");
}

int plain_answer(char *out, int cap, const ask *a, const course *c) {
  pen p = {out, cap, 0};
  int shown = (int)(sizeof ANSWER - 1) * c->answer / ANSWER_TOKENS;
  if (a->is_chat) {
    form(&p, "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"%s\","
             "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":", model);
    if (c->think && !c->has_marker) lit(&p, "null");
    else form(&p, "\"%.*s\"", shown, ANSWER);
    lit(&p, ",\"refusal\":null,\"annotations\":null,\"audio\":null,\"function_call\":null,\"reasoning\":");
    if (c->think) { lit(&p, "\""); for (int i = 0; i < c->think; i++) lit(&p, " think"); lit(&p, "\""); }
    else lit(&p, "null");
    lit(&p, "},");
  } else {
    form(&p, "{\"id\":\"cmpl-bench\",\"object\":\"text_completion\",\"created\":1700000000,\"model\":\"%s\","
             "\"choices\":[{\"index\":0,\"text\":\"%.*s\",", model, shown, ANSWER);
  }
  form(&p, "\"logprobs\":null,\"finish_reason\":\"%s\",\"stop_reason\":null,\"token_ids\":", c->is_cut ? "length" : "stop");
  if (a->wants_ids) output_ids(&p, c); else lit(&p, "null");
  if (!a->is_chat) all_prompt_ids(&p, a, c);
  form(&p, ",\"routed_experts\":null}],\"service_tier\":null,%s,", FINGERPRINT);
  final_usage(&p, c, output_tokens(c), ",\"multimodal_tokens\":null");
  if (a->is_chat) { all_prompt_ids(&p, a, c); lit(&p, ",\"prompt_text\":null"); }
  lit(&p, ",\"kv_transfer_params\":null,\"ec_transfer_params\":null,\"metrics\":null}");
  return p.len;
}

int model_list(char *out, int cap) {
  pen p = {out, cap, 0};
  form(&p, "{\"object\":\"list\",\"data\":[{\"id\":\"%s\",\"object\":\"model\",\"created\":1700000000,\"owned_by\":\"vllm\","
           "\"root\":\"%s\",\"parent\":null,\"max_model_len\":%d}]}", model, model, MAX_MODEL_LEN);
  return p.len;
}

/* Markers are single tokens; any other run of text is one token per four bytes. */
int tokenized(char *out, int cap, const char *body, int n) {
  pen p = {out, cap, 0};
  int count = 0, run = 0;
  char ids[1 << 15];
  pen q = {ids, sizeof ids, 0};
  const char *s = value_of(body, n, "prompt"), *e = body + n;
  ids[0] = 0;
  if (!s || *s != '"') {
    count = PROMPT_TOKENS;
    lit(&q, prompt_ids[1]);
  } else {
    for (s++; s < e && *s != '"'; s++) {
      int left = e - s, id = 0;
      if (left >= 8 && !memcmp(s, "</think>", 8)) { id = THINK_END_ID; s += 7; }
      else if (left >= 7 && !memcmp(s, "<think>", 7)) { id = THINK_START_ID; s += 6; }
      else if (*s == '\\' && s + 1 < e) s++;
      if (id) run = 0;
      else if (run++ % 4) continue;
      form(&q, count ? ",%d" : "%d", id ? id : 100 + count);
      count++;
    }
  }
  form(&p, "{\"count\":%d,\"max_model_len\":%d,\"tokens\":[%s],\"token_strs\":null}", count, MAX_MODEL_LEN, ids);
  return p.len;
}

int detokenized(char *out, int cap, const char *body, int n) {
  pen p = {out, cap, 0};
  const char *s = value_of(body, n, "tokens"), *e = body + n;
  lit(&p, "{\"prompt\":\"");
  for (; s && s < e && *s != ']'; s++) {
    if (*s < '0' || *s > '9') continue;
    long id = strtol(s, (char **)&s, 10);
    lit(&p, id == THINK_START_ID ? "<think>" : id == THINK_END_ID ? "</think>" : " tok");
    s--;
  }
  lit(&p, "\"}");
  return p.len;
}
