//! A conversation of forty turns costs its rows once and a fixed state a turn, and every turn can be gone back to.

use ampoule::backends::CpuBackend;
use ampoule::{Ampoule, EngineOptions, LoadOptions, TurnsOptions, turns};

#[test]
fn forty_turns_cost_what_is_new() {
    let engine = EngineOptions { slots: 2, ..EngineOptions::default() };
    let load = LoadOptions { context: 12_288, engine, ..LoadOptions::default() };
    let backend = CpuBackend::new(2);
    let mut model =
        Ampoule::load_on(&backend, "random:qwen3.5-tiny", &load, &mut |_, _| {}).unwrap();
    let (report, capsules) = turns(&mut model, &TurnsOptions::default(), &mut |_, _| {}).unwrap();
    println!(
        "{} held, {} at least, {:.4}; copies {:.1} times as much",
        report.held_bytes, report.floor_bytes, report.over_floor, report.copies_over_held
    );
    assert_eq!((report.turns.len(), report.restored), (40, 40));
    assert_eq!(report.mismatches, 0, "{:?}", report.first_mismatch);
    assert_eq!(report.held_bytes, report.own_bytes, "what capsules say is what the backend counts");
    assert!(report.over_floor <= 1.15, "{} of the least", report.over_floor);
    // A turn costs what it added: no more late than early.
    let row = report.final_row_bytes / report.turns[39].position as usize;
    for turn in &report.turns {
        assert_eq!(turn.own_row_bytes, (turn.message_tokens + turn.reply_tokens) * row);
        assert_eq!(turn.fixed_bytes, report.fixed_bytes);
    }
    assert!(report.turns.iter().any(|t| t.message_tokens > 10 * report.turns[4].message_tokens));
    // The last one needs the rows of all before it.
    let last = capsules.last().unwrap().clone();
    drop(capsules);
    assert_eq!(
        model.engine.capsule_bytes().0,
        report.final_row_bytes + report.fixed_bytes,
        "rows stay for the descendant, the other fixed states go"
    );
    drop(last);
    assert_eq!(model.engine.capsule_bytes().0, 0);
}
