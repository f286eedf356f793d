// quantize: rows to codes, four to a word, u32 [rows, CODE_WORDS], and a scale for each span of SPAN_WORDS words.
// A warp finds the largest magnitude of a span, as integers, then the scale and the codes from that; a word a lane, whose
// values it keeps. Twin: src/kernels/quantize.rs

constexpr unsigned WARPS = THREADS / 32;
constexpr unsigned WORDS = (SPAN_WORDS + 31) / 32;
// Longer spans are computed twice.
constexpr unsigned KEPT = WORDS <= 4 ? WORDS : 1;

KERNEL {
    WAIT;
    const unsigned lane = threadIdx.x % 32, items = token_count() * ROWS_PER_TOKEN * SPANS;
    for (unsigned item = blockIdx.x * WARPS + threadIdx.x / 32; item < items; item += gridDim.x * WARPS) {
        const unsigned row = item / SPANS, span = item % SPANS;
        const unsigned begin = span * SPAN_WORDS, end = min(begin + SPAN_WORDS, CODE_WORDS);
        const auto bits_of = [&](unsigned word, unsigned byte) {
            const unsigned col = 4 * word + byte;
            return word < end && col < COLS ? __float_as_uint(source_value(row, col)) : 0u;
        };
        unsigned kept[KEPT][4], magnitude = 0;
        if (WORDS <= KEPT) {
#pragma unroll
            for (unsigned at = 0; at < KEPT; at++) {
#pragma unroll
                for (unsigned byte = 0; byte < 4; byte++) {
                    kept[at][byte] = bits_of(begin + lane + 32 * at, byte);
                    magnitude = max(magnitude, kept[at][byte] & 0x7fffffffu);
                }
            }
        } else {
            for (unsigned word = begin + lane; word < end; word += 32) {
                for (unsigned byte = 0; byte < 4; byte++) {
                    magnitude = max(magnitude, bits_of(word, byte) & 0x7fffffffu);
                }
            }
        }
        const unsigned largest = __reduce_max_sync(0xffffffffu, magnitude);
        const unsigned amax = largest > INFINITE ? NAN_BITS : largest;
        const unsigned scale = final_scale(raw_scale(amax)), factor = span_factor(amax, scale);
        const auto store = [&](unsigned word, const auto& value) {
            unsigned codes = 0;
#pragma unroll
            for (unsigned byte = 0; byte < 4; byte++) {
                const unsigned bits = value(byte);
                const unsigned code = encode_code(bits >> 31, quotient(bits & 0x7fffffffu, factor));
                codes |= (4 * word + byte < COLS ? code : 0u) << (8 * byte);
            }
            codes_[row * CODE_WORDS + word] = codes;
        };
        if (WORDS <= KEPT) {
#pragma unroll
            for (unsigned at = 0; at < KEPT; at++) {
                if (begin + lane + 32 * at < end) {
                    store(begin + lane + 32 * at, [&](unsigned byte) { return kept[at][byte]; });
                }
            }
        } else {
            for (unsigned word = begin + lane; word < end; word += 32) {
                store(word, [&](unsigned byte) { return bits_of(word, byte); });
            }
        }
        if (lane == 0) {
            store_scale(row, span, scale);
        }
    }
}
