// Logits and greedy tokens of llama.cpp in float32, on one thread of the CPU.
//
//     llama_logits MODEL.gguf PROMPTS LOGITS NEW_TOKENS [LORA.gguf]
//
// PROMPTS holds one prompt a line, token ids with blanks between them. LOGITS becomes float32 of
// every position, prompt after prompt; greedy tokens go to standard output, a line each prompt.

#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

static const int ROOM = 512;  // of a prompt with its answer, in tokens

static void die(const char * what) {
    fprintf(stderr, "error: %s\n", what);
    exit(1);
}

static void put(llama_batch & batch, int at, llama_token token, int position) {
    batch.token[at] = token;
    batch.pos[at] = position;
    batch.n_seq_id[at] = 1;
    batch.seq_id[at][0] = 0;
    batch.logits[at] = 1;
}

int main(int argc, char ** argv) {
    if (argc < 5) die("MODEL.gguf PROMPTS LOGITS NEW_TOKENS [LORA.gguf]");
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) die("llama.cpp does not load the model");

    llama_context_params settings = llama_context_default_params();
    settings.n_ctx = settings.n_batch = settings.n_ubatch = ROOM;
    settings.n_threads = settings.n_threads_batch = 1;
    // The cache would be float16 otherwise.
    settings.type_k = settings.type_v = GGML_TYPE_F32;
    settings.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, settings);
    if (!context) die("llama.cpp makes no context");

    if (argc > 5) {
        llama_adapter_lora * adapter = llama_adapter_lora_init(model, argv[5]);
        if (!adapter) die("llama.cpp does not load the adapter");
        float scale = 1.0f;
        if (llama_set_adapters_lora(context, &adapter, 1, &scale)) die("the adapter is not set");
    }

    const int rows = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const int new_tokens = atoi(argv[4]);
    FILE * logits = fopen(argv[3], "wb");
    std::ifstream prompts(argv[2]);
    llama_batch batch = llama_batch_init(ROOM, 0, 1);
    for (std::string line; std::getline(prompts, line);) {
        std::istringstream words(line);
        std::vector<llama_token> tokens;
        for (int id; words >> id;) tokens.push_back(id);
        llama_memory_clear(llama_get_memory(context), true);

        const int length = (int) tokens.size();
        for (int i = 0; i < length; i++) put(batch, i, tokens[i], i);
        batch.n_tokens = length;
        if (llama_decode(context, batch)) die("llama.cpp does not compute the prompt");
        for (int i = 0; i < length; i++) {
            fwrite(llama_get_logits_ith(context, i), sizeof(float), rows, logits);
        }

        const float * last = llama_get_logits_ith(context, length - 1);
        for (int i = 0; i < new_tokens; i++) {
            const int best = (int) (std::max_element(last, last + rows) - last);
            printf("%d ", best);
            put(batch, 0, best, length + i);
            batch.n_tokens = 1;
            if (llama_decode(context, batch)) die("llama.cpp does not compute a token");
            last = llama_get_logits_ith(context, 0);
        }
        printf("\n");
    }
    fclose(logits);
    return 0;
}
