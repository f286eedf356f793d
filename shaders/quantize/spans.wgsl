// quantize: rows to codes, four to a word, u32 [rows, CODE_WORDS], and a scale for each span of SPAN_WORDS words.
// A workgroup finds the largest magnitude of a span, as integers, then the scale and the codes from that.
// Rows that stand beyond the grid are strided over. Twin: src/kernels/quantize.rs
var<workgroup> largest: array<u32, WORKGROUP_SIZE>;

fn magnitude_of(row: u32, word: u32) -> u32 {
    var magnitude = 0u;
    for (var byte = 0u; byte < 4u; byte++) {
        let col = 4u * word + byte;
        if col < COLS {
            magnitude = max(magnitude, bitcast<u32>(source_value(row, col)) & 0x7fffffffu);
        }
    }
    return magnitude;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row_count = token_count() * ROWS_PER_TOKEN;
    for (var row = workgroup.y; row < row_count; row += workgroups.y) {
        let last_span = min((workgroup.x + 1u) * SPANS_PER_WORKGROUP, SPANS);
        for (var span = workgroup.x * SPANS_PER_WORKGROUP; span < last_span; span++) {
            let begin = span * SPAN_WORDS;
            let end = min(begin + SPAN_WORDS, CODE_WORDS);
            var magnitude = 0u;
            for (var word = begin + index; word < end; word += WORKGROUP_SIZE) {
                magnitude = max(magnitude, magnitude_of(row, word));
            }
            largest[index] = magnitude;
            for (var half = WORKGROUP_SIZE / 2u; half > 0u; half /= 2u) {
                workgroupBarrier();
                if index < half {
                    largest[index] = max(largest[index], largest[index + half]);
                }
            }
            workgroupBarrier();
            let amax = select(largest[0], NAN_BITS, largest[0] > INFINITE);
            workgroupBarrier();
            let scale = final_scale(raw_scale(amax));
            let factor = span_factor(amax, scale);
            for (var word = begin + index; word < end; word += WORKGROUP_SIZE) {
                codes[row * CODE_WORDS + word] = word_of(row, word, factor);
            }
            if index == 0u {
                store_scale(row, span, scale);
            }
        }
    }
}
