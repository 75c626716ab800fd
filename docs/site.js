// What a screen reader and a keyboard need of the theme: a name for the search, tables that can be scrolled by keys.
function complete() {
  document.querySelectorAll(".md-search[role=dialog]").forEach((box) => box.setAttribute("aria-label", "Search"));
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex]), .md-typeset pre > code:not([tabindex])")
    .forEach((box) => box.setAttribute("tabindex", "0"));
}
complete();
new MutationObserver(complete).observe(document.body, { childList: true, subtree: true });  // the theme wraps tables late
