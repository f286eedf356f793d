fn row_scale(span: Span, row: u32) -> f32 {
    return 1.0;
}
