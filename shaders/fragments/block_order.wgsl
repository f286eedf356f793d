const ACT_ORDER: bool = true;

fn block_of(span: Span, row: u32, col: u32) -> u32 {
    return segment_word(span.order + row % PAIR * COLS + min(col, COLS - 1u));
}
