const ACT_ORDER: bool = false;
const HAS_ZERO: bool = false;
const HAS_MIN: bool = false;

fn scale_row(span: Span, row: u32) -> u32 {
    return 0u;
}

fn block_of(span: Span, row: u32, col: u32) -> u32 {
    return 0u;
}

fn scale_at(scales: u32, block: u32) -> f32 {
    return 1.0;
}

fn zero_at(scales: u32, block: u32) -> f32 {
    return 0.0;
}

fn min_at(scales: u32, block: u32) -> f32 {
    return 0.0;
}
