// Rows [row_begin, row_end) of one group's packed matrix that lie in this segment. Twin: kernels::pack.
struct Span {
    row_begin: u32,
    row_end: u32,
    codes: u32,        // in vec4<u32>
    scales: u32,       // in words
    bias: u32,         // in words
    first_block: u32,  // block of row_begin
    row_scales: u32,   // in words
    order: u32,        // in words
}

fn span_of(slot: u32) -> Span {
    let a = spans[2u * slot];
    let b = spans[2u * slot + 1u];
    return Span(a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w);
}

fn segment_word(word: u32) -> u32 {
    return segment[word >> 2u][word & 3u];
}
