/* shapes: what a vLLM 0.32 server says, as bytes.
 *
 * Owns: reading the few request fields that change an answer, and the JSON of answers and stream
 * chunks. Does not own: sockets, HTTP framing, pacing (fastup.c).
 *
 * Field order and the null fields are those of a recorded vLLM 0.32.0 (qwen3 reasoning parser, with
 * --enable-prompt-tokens-details): chunks without unset fields, plain answers with every field.
 */
#ifndef SHAPES_H
#define SHAPES_H
#include <stdint.h>

enum { THINK_START_ID = 151667, THINK_END_ID = 151668, STOP_ID = 151645 };
enum { PROMPT_TOKENS = 212, CACHED_TOKENS = 192, ANSWER_TOKENS = 58, MAX_MODEL_LEN = 32768 };

/* What one request asks for. */
typedef struct {
  int is_stream, wants_ids, wants_usage, wants_continuous_usage, thinks_off, is_chat;
  long budget;   /* thinking_token_budget, -1 when absent */
  long limit;    /* most output tokens, -1 when absent */
  int interval;  /* stream_interval: tokens per chunk, after the first */
} ask;

/* How the answer to it will run. Markers are not stamped and take no time of their own. */
typedef struct {
  int think, answer;   /* stamped tokens */
  int is_open;         /* the template ended the prompt with the start marker */
  int has_marker;      /* the end marker is among the output tokens */
  int is_cut;          /* the output limit ended it: finish_reason length */
} course;

void shapes_init(const char *model);
ask read_ask(const char *body, int n, int is_chat);

/* `think`: tokens the model would think by itself; 0: a model that does not think. */
course plan_course(const ask *a, int think, int answer);
int output_tokens(const course *p);

/* When the limit cuts the answer the last token carries the finish_reason and there is no finish chunk.
 * Each writes one JSON document into `out`, returns its length (0: vLLM says nothing here). */
int role_chunk(char *out, int cap, const ask *a, const course *p);
int token_chunk(char *out, int cap, const ask *a, const course *p, int i, uint64_t sent_ns);   /* token i, or the group at i */
int group_at(const ask *a, const course *p, int i);   /* how many tokens the chunk at i carries */
int marker_chunk(char *out, int cap, const ask *a, const course *p);
int finish_chunk(char *out, int cap, const ask *a, const course *p);
int usage_chunk(char *out, int cap, const ask *a, const course *p);
int plain_answer(char *out, int cap, const ask *a, const course *p);
int model_list(char *out, int cap);
int tokenized(char *out, int cap, const char *body, int n);
int detokenized(char *out, int cap, const char *body, int n);
#endif
