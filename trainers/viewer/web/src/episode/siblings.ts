/** How far each total is from the mean, and the farthest of all. */
export function spread(totals: readonly (number | null)[]): { mean: number; most: number } {
  const known = totals.filter((total) => total !== null);
  const mean = known.reduce((sum, total) => sum + total, 0) / Math.max(known.length, 1);
  return { mean, most: Math.max(0, ...known.map((total) => Math.abs(total - mean))) };
}
