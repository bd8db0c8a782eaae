// The log-in form.

const form = document.getElementById("login");
const problem = document.getElementById("problem");

if (location.search === "?used") {
  problem.textContent = "This link was used already, or is from an earlier start. Log in, or start the server again.";
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  problem.textContent = "";
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const body = JSON.stringify({ name: form.elements.name.value, password: form.elements.password.value });
    const response = await fetch("/login", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const answer = await response.json();
    if (response.ok) {
      location.replace("/");
      return;
    }
    problem.textContent = answer.error.message;
  } catch {
    problem.textContent = "The server does not answer.";
  }
  button.disabled = false;
  form.elements.password.select();
});
