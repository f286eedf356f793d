const ACT_ORDER: bool = false;

// Columns of padding belong to the last block: what lies behind its scale is another row's.
fn block_of(span: Span, row: u32, col: u32) -> u32 {
    return min(col / BLOCK_COLS, BLOCKS_PER_ROW - 1u);
}
