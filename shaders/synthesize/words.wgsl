// synthesize: every word of the runs in a segment of packed weights, u32, from a hash of its place in the checkpoint:
// tensor, group, row and word of the row. A word is `(hash & MASK) + BASE`, which makes its bits legal codes; what lies
// behind the last element of a row is 0. Grid: (any, groups). Twin: src/kernels/synthesize.rs
fn mix(value: u32) -> u32 {
    var h = value;
    h = (h ^ (h >> 16u)) * 0x85ebca6bu;
    h = (h ^ (h >> 13u)) * 0xc2b2ae35u;
    return h ^ (h >> 16u);
}

fn hash_at(tensor: u32, group: u32, row: u32, word: u32) -> u32 {
    return mix(mix(mix(tensor * 0x9e3779b9u + group) + row) + word * 0x9e3779b9u);
}

// The bits of a word that hold elements: 2^log_per_word of them, of a row of `count`.
fn kept(count: u32, word: u32, log_per_word: u32) -> u32 {
    let first = word << log_per_word;
    let held = max(count, first) - first;
    if held >> log_per_word > 0u {
        return 0xffffffffu;
    }
    return (1u << (held << (5u - log_per_word))) - 1u;
}

fn synthetic_word(span: Span, group: u32, word: u32) -> u32 {
    if word < span.scales {
        let at = word - 4u * span.codes;
        let row = span.row_begin + at / ROW_WORDS;
        let hash = hash_at(FIRST_TENSOR + 3u * (row % PAIR), group, row / PAIR, at % ROW_WORDS);
        return ((hash & CODE_MASK) + CODE_BASE) & kept(COLS, at % ROW_WORDS, CODE_LOG);
    }
    if word < span.bias {
        let at = word - span.scales;
        let scale_row = at / SCALE_WORDS;
        let block = span.first_block + scale_row / PAIR;
        let hash = hash_at(FIRST_TENSOR + 3u * (scale_row % PAIR) + 1u, group, block, at % SCALE_WORDS);
        return ((hash & SCALE_MASK) + SCALE_BASE) & kept(BLOCKS, at % SCALE_WORDS, SCALE_LOG);
    }
    let row = span.row_begin + word - span.bias;
    if !BIAS || row >= span.row_end {
        return 0u;
    }
    let hash = hash_at(FIRST_TENSOR + 3u * (row % PAIR) + 2u, group, row / PAIR, 0u);
    return (hash & BIAS_MASK) + BIAS_BASE;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let group = workgroup.y;
    let span = span_of(group);
    let rows = span.row_end - span.row_begin;
    if rows == 0u {
        return;
    }
    let end = (span.bias + select(0u, rows, BIAS) + 3u) / 4u;
    for (var at = span.codes + workgroup.x * 256u + index; at < end; at += workgroups.x * 256u) {
        let word = 4u * at;
        segment[at] = vec4<u32>(
            synthetic_word(span, group, word),
            synthetic_word(span, group, word + 1u),
            synthetic_word(span, group, word + 2u),
            synthetic_word(span, group, word + 3u),
        );
    }
}
