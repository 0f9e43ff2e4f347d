"""The words of this field, each in three plain sentences, with the command that shows the thing at work.

`fact` names a row of FACTS in term_facts.py, which finds a number for it in a model. In commands MODEL stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One word, in three sentences. `also` are its other names; `area` groups the list."""

    name: str
    area: str
    command: str
    first: str
    second: str
    third: str
    also: tuple[str, ...] = ()
    fact: str | None = None

    @property
    def sentences(self) -> tuple[str, str, str]:
        """What it is, how it works or what it does, and what follows for the user."""
        return self.first, self.second, self.third


_TERMS = (
    # ── text and tokens ──
    Term(
        "token", "text", 'llmkit inspect tokens "Hello, wörld!" --model MODEL',
        "A token is a piece of text, often a word or a part of one, that the model knows by a number.",
        "The model reads and writes nothing else: your text is cut into tokens first, and answers are joined again.",
        "Prices, speeds and the context's length are counted in tokens, so rare words and other scripts cost more.",
        also=("tokens",), fact="vocabulary",
    ),
    Term(
        "tokenizer", "text", 'llmkit inspect tokens "Hello, wörld!" --model MODEL',
        "The tokenizer is the rule that cuts text into tokens; it was fixed before the model was trained.",
        "Most are byte-pair encodings: pieces that often stood side by side in a large text were merged, step by step.",
        "Another tokenizer has other numbers for the same text, so the tokens of two models cannot be mixed.",
        also=("vocabulary", "vocab", "BPE", "byte-pair encoding"), fact="tokenizer",
    ),
    Term(
        "BOS and EOS", "text", "llmkit inspect MODEL",
        "BOS and EOS are special tokens for the beginning of a text and for its end.",
        "The model learnt to expect BOS where it was trained with one, and says EOS when its answer is complete.",
        "A BOS too many or an EOS that is not recognised gives odd answers or answers that never stop.",
        also=("BOS", "EOS", "end of sequence", "special tokens", "stop token"), fact="bos_eos",
    ),
    Term(
        "chat template", "text", 'llmkit inspect xray "Where is Paris?" --model MODEL',
        "A chat template writes a conversation as one text, with marks for who speaks.",
        "Models for chat were trained on exactly one such form, and answer worse in any other.",
        "The template is a small program in the model's file, and the marks it writes are tokens you pay for.",
        also=("template", "prompt format", "ChatML"), fact="template",
    ),
    Term(
        "embedding", "text", "llmkit inspect embeddings --model MODEL --near king",
        "An embedding is a list of numbers that stands for a token or for a whole text.",
        "A model's first table has a row of numbers for each token; rows of similar tokens point the same way.",
        "Texts are compared by the angle between such lists, which is how search by meaning works.",
        also=("embeddings", "vector", "token embedding"), fact="embedding",
    ),
    Term(
        "context", "text", "llmkit estimate MODEL --context 4096",
        "The context is everything the model can see at once: system prompt, conversation so far, and its own answer.",
        "It has a length in tokens that was fixed by training; what does not fit is not there for the model.",
        "A longer context takes more memory for the KV cache and more time for every new token.",
        also=("context length", "context window", "n_ctx"), fact="context",
    ),
    # ── choosing the next token ──
    Term(
        "logits", "sampling", 'llmkit inspect temperature "The capital of France is" --model MODEL',
        "Logits are the numbers a model gives for what comes next: one for each token of its vocabulary.",
        "They may be any numbers, positive or negative; only their differences matter.",
        "Softmax makes probabilities of them, and a sampler picks one token.",
        also=("logit",), fact="logits",
    ),
    Term(
        "softmax", "sampling", 'llmkit inspect temperature "The capital of France is" --model MODEL',
        "Softmax makes probabilities of logits: each becomes e to its power, divided by the sum of all of them.",
        "The maximum is subtracted first: e^800 overflows, e^(800 − 800) is 1, and the quotients stay the same.",
        "So (2, 1, 0) becomes (0.665, 0.245, 0.090), and so does (802, 801, 800).",
        also=("log-softmax",),
    ),
    Term(
        "temperature", "sampling", 'llmkit inspect temperature "The capital of France is" --model MODEL',
        "Temperature divides the logits before softmax: below 1 likely tokens gain, above 1 unlikely ones do.",
        "At 0 the most likely token is always taken; at 1 the model's own probabilities hold.",
        "It changes how a token is chosen, never what the model knows: a low temperature makes no answer truer.",
        also=("temp",),
    ),
    Term(
        "top-k, top-p, min-p", "sampling", 'llmkit inspect temperature "The capital of France is" --model MODEL',
        "They remove unlikely tokens before one is drawn, so that a rare accident does not derail the answer.",
        "Top-k keeps the k best, top-p the fewest that reach p together, min-p those at least p times the best.",
        "The order matters: what an earlier stage has removed, a high temperature after it cannot bring back.",
        also=("top-k", "top-p", "min-p", "nucleus sampling", "sampler", "samplers", "sampling"),
    ),
    Term(
        "seed", "sampling", 'llmkit chat MODEL --seed 7 --prompt "Tell me a story."',
        "The seed starts the random numbers that choose among the probable tokens.",
        "The same seed, prompt, settings, file and build of the engine give the same answer, token by token.",
        "Another machine or version may round differently, and one token that flips changes all that follow.",
        also=("random seed", "determinism", "reproducible"),
    ),
    Term(
        "hallucination", "sampling", 'llmkit inspect doubt "Who was king of Mars?" --model MODEL',
        "A hallucination is a statement that sounds right and is made up.",
        "The model continues text plausibly; it has no second place where it looks up whether that is so.",
        "Low probabilities and answers that differ between tries are hints; but a model can be sure and wrong.",
        also=("hallucinate", "confabulation", "making things up"),
    ),
    Term(
        "entropy", "sampling", 'llmkit chat MODEL --prompt "Where is Paris?" --show-probabilities',
        "Entropy says how undecided a distribution is: 0 bits when one token is certain, 1 bit for two equal ones.",
        "It is the mean of −log2 of the probabilities, each counted as often as it occurs.",
        "High entropy at a token means that many continuations were possible there, not that the answer is wrong.",
        also=("uncertainty", "surprise"), fact="entropy",
    ),
    # ── inside ──
    Term(
        "attention", "inside", 'llmkit inspect attention "The cat sat on the mat" --model MODEL',
        "In attention each token looks back at those before it and takes something over from those that matter to it.",
        "Each layer has several heads, and each head its own idea of what matters; the weights of a head sum to 1.",
        "The work grows with the square of the length when a prompt is read, which is why long prompts take long.",
        also=("self-attention", "attention head", "heads"), fact="attention",
    ),
    Term(
        "layer", "inside", 'llmkit inspect layers "The capital of France is" --model MODEL',
        "A model is a stack of layers of the same shape, each with an attention and a feed-forward part.",
        "All read from and add to one list of numbers per token, the residual stream, that runs through the model.",
        "After the last layer that list is compared with every token of the vocabulary: those are the logits.",
        also=("layers", "residual stream", "block", "transformer", "feed-forward", "MLP"), fact="layers",
    ),
    Term(
        "logit lens", "inside", 'llmkit inspect lens "The capital of France is" --model MODEL',
        "The logit lens asks after each layer: what would the model say if it stopped here?",
        "It puts the residual stream of that layer through the model's own last norm and output table.",
        "In early layers the result is noise; in late ones one sees where the answer forms.",
        also=("lens", "tuned lens"),
    ),
    Term(
        "mixture of experts", "inside", "llmkit estimate MODEL",
        "In a mixture of experts a layer has many feed-forward parts, and a router sends each token to a few of them.",
        "All experts must be in memory, only the chosen ones are read for a token: large like all, fast like few.",
        "Such a model needs memory for its total weights and bandwidth for its active ones.",
        also=("MoE", "experts", "router", "active parameters"), fact="experts",
    ),
    Term(
        "RoPE", "inside", "llmkit inspect MODEL --metadata",
        "RoPE turns parts of each query and key by an angle that grows with the token's position.",
        "So a score of attention depends on how far two tokens are apart.",
        "Beyond the lengths seen in training the angles are new to the model; scaling them stretches its context.",
        also=("rotary embedding", "position"), fact="rope",
    ),
    Term(
        "LoRA", "inside", "llmkit inspect MODEL --tensors",
        "LoRA trains two thin matrices beside a weight matrix instead of the matrix itself.",
        "Their product is added to it, so an adapter has about a hundredth of the weights and fits a small file.",
        "An adapter belongs to one base model; merged into it, the result is a model like any other.",
        also=("adapter", "fine-tuning", "QLoRA"), fact="lora",
    ),
    # ── numbers and quantization ──
    Term(
        "FP32, FP16, BF16", "numbers", "llmkit inspect numbers 0.1 --as fp32,fp16,bf16",
        "They write a number in 32 or 16 bits: a sign, an exponent for the size, a mantissa for the digits.",
        "FP16 has three more bits of digits than BF16; BF16 has the range of FP32, FP16 ends at 65504.",
        "Most models are trained and published in BF16: 2 bytes for each weight.",
        also=("FP32", "FP16", "BF16", "float16", "bfloat16", "half precision", "FP8"), fact="sixteen_bits",
    ),
    Term(
        "quantization", "numbers", "llmkit inspect quant",
        "Quantization stores weights as small whole numbers with a shared scale, instead of 16-bit floats.",
        "Where 3.2 is the largest weight, 8 bits make round(0.1 · 127 / 3.2) = 4 of 0.1, which stands for 0.1008.",
        "Four bits take about a quarter of the memory and are read four times as fast; a little is lost for good.",
        also=("quantize", "quant", "quants", "absmax"), fact="quantization",
    ),
    Term(
        "post-training quantization", "numbers", "llmkit quantize MODEL Q4_K_M --dry-run",
        "Post-training quantization makes a finished model smaller, without training it again.",
        "It needs minutes and the weights alone, at best some text to see which columns matter (an importance matrix).",
        "This is what llmkit does, for the weights only.",
        also=("PTQ",), fact="quantization",
    ),
    Term(
        "weight-only quantization", "numbers", "llmkit inspect quant",
        "Only the stored weights are small numbers; what flows through the model stays in floats.",
        "While it runs, weights become floats again, or both are multiplied as whole numbers block by block.",
        "It saves memory and bandwidth, the bottleneck of chatting; it does not by itself save arithmetic.",
        also=("weight-only",), fact="quantization",
    ),
    Term(
        "dynamic quantization", "numbers", "llmkit inspect quant",
        "Dynamic quantization also makes small numbers of the activations, with scales found while the model runs.",
        "On a CPU llama.cpp does so in each matrix product: activations become Q8 blocks for a moment.",
        "Published “dynamic quants” mean something else: a mix of types, chosen tensor by tensor.",
        also=("dynamic",),
    ),
    Term(
        "static quantization", "numbers", "llmkit inspect quant",
        "Static quantization fixes the scales of activations beforehand, from examples run through the model.",
        "It is faster than finding them while running, and wrong for inputs unlike the examples.",
        "GGUF files hold no such scales: llmkit does not do it.",
        also=("static",),
    ),
    Term(
        "quantization-aware training", "numbers", "llmkit search gemma qat",
        "In quantization-aware training a model feels the rounding while it is trained, and learns around it.",
        "It loses least at a given size, but needs the training data and much computing.",
        "Some publishers do it (Gemma's QAT files are for Q4_0); llmkit does not train.",
        also=("QAT", "fake quantization"),
    ),
    Term(
        "zero-point", "numbers", "llmkit inspect quant",
        "A zero-point is the code that stands for 0 when codes are spread from the smallest weight to the largest.",
        "It wastes no codes on values that do not occur, at the price of a second number per block.",
        "GGUF's type-1 blocks (Q4_1, Q4_K …) store the smallest value itself instead: w = d · q + m.",
        also=("asymmetric", "symmetric", "type-0", "type-1"),
    ),
    Term(
        "K-quants", "numbers", "llmkit inspect quant MODEL --type Q6_K",
        "K-quants (Q2_K to Q6_K) pack 256 weights as a super-block of smaller blocks.",
        "The blocks' scales are codes of 4, 6 or 8 bits themselves, times one 16-bit number: good scales for few bits.",
        "Q4_K takes 4.5 bits a weight; in Q4_K_M some tensors are in larger types, so the file comes to about 4.9.",
        also=("K-quant", "super-block", "Q4_K", "Q4_K_M", "Q6_K"), fact="types",
    ),
    Term(
        "i-quants", "numbers", "llmkit inspect quant MODEL --type IQ4_NL",
        "I-quants (IQ1 to IQ4) store places in a table or grid of useful values instead of evenly spaced codes.",
        "That makes 2 to 3 bits bearable; below 3 bits they need an importance matrix.",
        "They are slow to make and slower than K-quants on a CPU.",
        also=("i-quant", "IQ4_XS", "IQ4_NL", "IQ3_S"), fact="types",
    ),
    Term(
        "bits per weight", "numbers", "llmkit inspect MODEL",
        "Bits per weight is the size of the tensors in bits over the number of weights: what compression came to.",
        "Scales count, so Q4_0 is 4.5 and Q8_0 is 8.5; and a mix lies between its types.",
        "Times the number of weights, over 8, it gives the bytes that must fit into memory.",
        also=("bpw",), fact="bits_per_weight",
    ),
    Term(
        "imatrix", "numbers", "llmkit quantize MODEL IQ4_XS --imatrix imatrix.gguf --dry-run",
        "An importance matrix says, for each column of a tensor, how large its inputs are on real text.",
        "Quantization then rounds the columns that matter more carefully, and others less.",
        "It helps most below 5 bits, and is made by running some text through the model.",
        also=("importance matrix", "calibration"), fact="imatrix",
    ),
    # ── quality ──
    Term(
        "perplexity", "quality", 'llmkit chat MODEL --prompt "Where is Paris?" --show-probabilities',
        "Perplexity says how surprised a model is by a text: among how many equally likely tokens it wavers.",
        "It is e to the mean of −log of the probabilities of the tokens that really came; lower is better.",
        "Values compare only for the same text and the same tokenizer.",
        also=("PPL", "cross-entropy"), fact="perplexity",
    ),
    Term(
        "KL divergence", "quality", 'llmkit compare MODEL other.gguf --prompt "Where is Paris?"',
        "KL divergence measures how far the probabilities of one model are from another's, token by token.",
        "Between a model and its quant it shows the damage: 0 is none, 0.01 hard to notice, 0.3 another model.",
        "It needs no right answers, and sees what perplexity averages away.",
        also=("KLD", "KL", "relative entropy"),
    ),
    # ── running ──
    Term(
        "KV cache", "running", "llmkit estimate MODEL --context 4096",
        "The KV cache keeps the keys and values that attention made of earlier tokens, so that none is computed twice.",
        "It grows with every token of context, and for long contexts can be larger than the weights.",
        "What a new prompt shares with the last one, from its beginning, need not be read again.",
        also=("KV", "key-value cache", "prefix cache"), fact="kv_cache",
    ),
    Term(
        "prefill and decode", "running", "llmkit estimate MODEL",
        "Prefill reads the prompt, all tokens at once; decode writes the answer, one token after another.",
        "Prefill is bound by arithmetic, decode by memory: each new token reads all the weights once.",
        "So the first token waits for the prompt, and the rest come at a pace set by bandwidth over file size.",
        also=("prefill", "decode", "prompt processing", "time to first token", "TTFT"), fact="decode",
    ),
    Term(
        "FLOPs against bandwidth", "running", "llmkit devices",
        "For each token a model does two operations per weight, and reads each weight once.",
        "Processors do many operations in the time one byte comes from memory, so in answering they wait for it.",
        "That is why a smaller file is faster, and why TOPS say little about chatting and GB/s much.",
        also=("FLOPs", "bandwidth", "TOPS", "memory bound", "tokens per second"), fact="flops",
    ),
    Term(
        "flash attention", "running", 'llmkit inspect attention "The cat sat on the mat" --model MODEL',
        "Flash attention computes attention in tiles and never writes the whole table of scores to memory.",
        "The result is the same up to rounding; long contexts take far less memory and time.",
        "Since the scores are not kept, inspecting attention has to switch it off.",
        also=("flash-attn",), fact="scores",
    ),
    Term(
        "speculative decoding", "running", "llmkit estimate MODEL",
        "A small model, or a guess, proposes several tokens; the large one checks them all in one pass.",
        "Those it agrees with are kept, so the answer is the same and comes sooner.",
        "It pays where decode waits for memory and guesses are often right, as in code.",
        also=("draft model", "MTP"), fact="decode",
    ),
    # ── files ──
    Term(
        "GGUF", "files", "llmkit inspect MODEL",
        "GGUF is llama.cpp's file for a model: settings, tokenizer, template and all tensors in one.",
        "A header tells every tensor's name, shape, type and place; the weights follow as they are used in memory.",
        "So a file can be mapped and run at once, with nothing beside it.",
        also=("GGML",), fact="gguf",
    ),
    Term(
        "safetensors", "files", "llmkit convert org/name --dry-run",
        "Safetensors is Hugging Face's file for weights: a short JSON header, then the bytes of the tensors.",
        "Unlike the pickles before it, it cannot run code when it is opened.",
        "A checkpoint is a folder of such files with config.json and the tokenizer beside them.",
        also=("checkpoint",),
    ),
    Term(
        "mmap", "files", "llmkit estimate MODEL",
        "With mmap a file is used as if it were memory: pages are read when they are touched.",
        "Loading takes no time, and memory that other programs need is given back without writing anything.",
        "When the file is larger than the free memory, pages are read again and again, and answers crawl.",
        also=("memory mapping", "memory-mapped"), fact="mapped",
    ),
)  # fmt: skip
TERMS = {term.name: term for term in _TERMS}

AREAS = {
    "text": "Text and tokens",
    "sampling": "Choosing the next token",
    "inside": "Inside a model",
    "numbers": "Numbers and quantization",
    "quality": "Quality",
    "running": "Running",
    "files": "Files",
}
